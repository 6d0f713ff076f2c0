// Ends what avx512.h begins: compiling for the instructions of AVX-512.
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
