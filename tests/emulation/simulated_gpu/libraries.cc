// Stand-ins for libcublas, libcurand and libnvrtc: they can be opened, and do nothing else. No types: real headers have other ones.
extern "C" {
int cublasCreate_v2() { return 0; }
int cublasDestroy_v2() { return 0; }
int cublasSgemm_v2() { return 15; }  // not supported
int cublasGemmEx() { return 15; }
int cublasGemmStridedBatchedEx() { return 15; }
int curandCreateGenerator() { return 0; }
int curandDestroyGenerator() { return 0; }
int curandSetPseudoRandomGeneratorSeed() { return 0; }
}
