// A decode loop with nothing but kvk's C++ face, on the CPU: loop.h says what it does.
//
// KVK_LOG=1 and KVK_DUMP=FOLDER show what it calls (docs/record.md).
#include <kvk/kvk.h>

#include <cstdio>
#include <utility>
#include <vector>

#include "loop.h"

using engine::kSetup;

namespace {

template <class T>
class HostArray {
 public:
  HostArray(std::vector<T> values, bool) : values_(std::move(values)) {}
  T* data() const {
    return const_cast<T*>(values_.data());
  }  // a kvk::Tensor views what is read and what is written alike
  const std::vector<T>& host() const { return values_; }

 private:
  std::vector<T> values_;
};

}  // namespace

int main() {
  const double worst = engine::decode_loop<float, HostArray>(kSetup, kvk::Device{}, {});
  std::printf("%d steps of %d requests at %s: %.1f bits an element in full pages, largest error %.1e\n",
              kSetup.num_steps, kSetup.num_requests, kvk::cpu_level(), engine::bits_per_element(kSetup.format), worst);
  return worst < 5e-3 ? 0 : 1;
}
