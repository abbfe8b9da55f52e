// Proves that the emulated older CPU is one: this program, compiled for AVX2, must die there of an illegal instruction.
#include <immintrin.h>

#include <cstdio>
#include <cstdlib>

int main(int argc, char**) {
  const __m256i sum = _mm256_add_epi32(_mm256_set1_epi32(argc), _mm256_set1_epi32(41));
  int lanes[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sum);
  std::printf("avx2 says %d\n", lanes[5]);
  return lanes[5] == 42 ? EXIT_SUCCESS : EXIT_FAILURE;
}
