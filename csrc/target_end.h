// Ends what a file of kernels begins: compiling for the instructions of some CPUs only.
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
