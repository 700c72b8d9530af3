// libcuda.so.1 and libnvidia-ml.so.1 with one card: what moss_jt.backend.gpu and Jittor ask before any work starts.
#include <cstdlib>
#include <cstring>

static size_t memory() {
    const char* text = getenv("SIM_GPU_MEMORY");
    return text && *text ? (size_t)atof(text) : (size_t)2e9;
}

struct Memory {
    unsigned long long total, free, used;
};

extern "C" {
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 12040, 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGet(int* device, int) { return *device = 0, 0; }
int cuDeviceGetName(char* name, int, int) { return strcpy(name, "simulated GPU"), 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = memory(), 0; }
int cuDeviceGetPCIBusId(char* bus, int, int) { return strcpy(bus, "0000:01:00.0"), 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) { return *value = attribute == 75 ? 8 : 6, 0; }
int nvmlInit_v2() { return 0; }
int nvmlShutdown() { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** handle) { return *handle = nullptr, 0; }
int nvmlDeviceGetMemoryInfo(void*, Memory* found) { return *found = {memory(), memory(), 0}, 0; }
}
