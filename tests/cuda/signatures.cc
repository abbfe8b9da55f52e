// Compiled, not run: the declarations of csrc/cuda/driver.h and nvrtc.h against NVIDIA's own headers. Enums are ints there
// and handles are pointers to structs of other names, so what is compared is what the call needs: the number of parameters,
// and of each its size, whether it is a pointer, and to how many levels.
#include <cuda.h>
#include <nvrtc.h>

#include <type_traits>

#include "cuda/driver.h"
#include "cuda/nvrtc.h"

namespace {

template <class A, class B>
constexpr bool same_kind() {
  if constexpr (std::is_pointer_v<A> && std::is_pointer_v<B>) {
    using ToA = std::remove_pointer_t<A>;
    using ToB = std::remove_pointer_t<B>;
    if constexpr (std::is_const_v<ToA> != std::is_const_v<ToB>) {
      return false;
    } else if constexpr (std::is_class_v<std::remove_cv_t<ToA>> || std::is_void_v<ToA> || std::is_void_v<ToB>) {
      return std::is_class_v<std::remove_cv_t<ToA>> == std::is_class_v<std::remove_cv_t<ToB>> &&
             std::is_void_v<ToA> == std::is_void_v<ToB>;
    } else {
      return same_kind<std::remove_cv_t<ToA>, std::remove_cv_t<ToB>>();
    }
  } else if constexpr (std::is_pointer_v<A> || std::is_pointer_v<B>) {
    return false;
  } else {
    constexpr bool integers =
        (std::is_integral_v<A> || std::is_enum_v<A>) && (std::is_integral_v<B> || std::is_enum_v<B>);
    return integers && sizeof(A) == sizeof(B);
  }
}

template <class Ours, class Theirs>
struct SameCall : std::false_type {};
template <class R, class... A, class S, class... B>
  requires(sizeof...(A) == sizeof...(B))
struct SameCall<R (*)(A...), S (*)(B...)> {
  static constexpr bool value = sizeof(R) == sizeof(S) && (same_kind<A, B>() && ...);
};

// The comparison itself can fail.
static_assert(!SameCall<int (*)(int*), int (*)(int)>::value && !SameCall<int (*)(int), int (*)(long)>::value);
static_assert(!SameCall<int (*)(int**), int (*)(int*)>::value && !SameCall<int (*)(const int*), int (*)(int*)>::value);
static_assert(!SameCall<int (*)(), int (*)(int)>::value && !SameCall<int (*)(void*), int (*)(int*)>::value);

#define KVK_COMPARE(library, symbol) \
  static_assert(SameCall<decltype(kvk::cuda::library::symbol.function), decltype(&::symbol)>::value, #symbol);
#define KVK_COMPARE_DRIVER(symbol, ...) KVK_COMPARE(Driver, symbol)
#define KVK_COMPARE_NVRTC(symbol, ...) KVK_COMPARE(Nvrtc, symbol)
KVK_DRIVER_CALLS(KVK_COMPARE_DRIVER)
KVK_OPTIONAL_DRIVER_CALLS(KVK_COMPARE_DRIVER)
KVK_NVRTC_CALLS(KVK_COMPARE_NVRTC)

#define KVK_COMPARE_CONSTANT(name) static_assert(kvk::cuda::name == static_cast<int>(::name), #name);
KVK_COMPARE_CONSTANT(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
KVK_COMPARE_CONSTANT(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
KVK_COMPARE_CONSTANT(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
KVK_COMPARE_CONSTANT(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
KVK_COMPARE_CONSTANT(CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
KVK_COMPARE_CONSTANT(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
KVK_COMPARE_CONSTANT(CU_JIT_ERROR_LOG_BUFFER)
KVK_COMPARE_CONSTANT(CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES)
KVK_COMPARE_CONSTANT(CU_STREAM_CAPTURE_STATUS_NONE)
KVK_COMPARE_CONSTANT(CU_STREAM_CAPTURE_MODE_RELAXED)
KVK_COMPARE_CONSTANT(CUDA_ERROR_NO_DEVICE)
KVK_COMPARE_CONSTANT(CUDA_ERROR_INVALID_IMAGE)
KVK_COMPARE_CONSTANT(CUDA_ERROR_NO_BINARY_FOR_GPU)
KVK_COMPARE_CONSTANT(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
KVK_COMPARE_CONSTANT(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)
KVK_COMPARE_CONSTANT(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT)

// What driver.cc names by number.
static_assert(CUDA_ERROR_ECC_UNCORRECTABLE == 214 && CUDA_ERROR_ILLEGAL_ADDRESS == 700 &&
              CUDA_ERROR_LAUNCH_TIMEOUT == 702);
static_assert(CUDA_ERROR_ASSERT == 710 && CUDA_ERROR_HARDWARE_STACK_ERROR == 714 &&
              CUDA_ERROR_ILLEGAL_INSTRUCTION == 715);
static_assert(CUDA_ERROR_MISALIGNED_ADDRESS == 716 && CUDA_ERROR_INVALID_ADDRESS_SPACE == 717);
static_assert(CUDA_ERROR_INVALID_PC == 718 && CUDA_ERROR_LAUNCH_FAILED == 719);
static_assert(NVRTC_ERROR_COMPILATION == 6 && NVRTC_ERROR_BUILTIN_OPERATION_FAILURE == 7);

}  // namespace
