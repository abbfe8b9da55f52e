// Which backend a call goes to.
#pragma once

#include "core/check.h"
#include "kvk/context.h"

namespace kvk {

inline Threads& threads_of(const Context& context) { return context.threads ? *context.threads : default_threads(); }

// Calls on_cpu() or on_cuda(), by the device of the op's first tensor.
template <class OnCpu, class OnCuda>
void by_device(const char* op, const Tensor& first, const char* name, OnCpu&& on_cpu, OnCuda&& on_cuda) {
  switch (first.device.type) {
    case DeviceType::cpu: return on_cpu();
    case DeviceType::cuda: return on_cuda();
    case DeviceType::other: break;
  }
  fail(op, name, " must be on cpu or cuda, got ", device_name(first.device));
}

}  // namespace kvk
