// libcuda.so.1 and libnvidia-ml.so.1 with one card or, for questions only, SIM_GPU_CARDS: what moss_jt.backend.cards and Jittor ask
// before any work starts. CUDA_VISIBLE_DEVICES chooses among them by number.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

static double number(const char* name, double otherwise) {
    const char* text = getenv(name);
    return text && *text ? atof(text) : otherwise;
}
static size_t memory() { return (size_t)number("SIM_GPU_MEMORY", 2e9); }

// Numbers of the cards that are shown, in their order; CUDA reads the variable when it starts.
static std::vector<int> shown() {
    const char* visible = getenv("CUDA_VISIBLE_DEVICES");
    const int count = (int)number("SIM_GPU_CARDS", 1);
    std::vector<int> found;
    if (visible) {
        std::stringstream numbers(visible);
        for (std::string number; std::getline(numbers, number, ',') && atoi(number.c_str()) < count;)
            found.push_back(atoi(number.c_str()));
    } else {
        for (int i = 0; i < count; i++) found.push_back(i);
    }
    return found;
}
static const std::vector<int>& cards() {
    static const std::vector<int> found = shown();
    return found;
}

struct Memory {
    unsigned long long total, free, used;
};

// What stands for a CUfunction, and an argument with its number of elements: tests/emulation/emulation.h.
struct Function {
    void (*launch)(unsigned, unsigned, unsigned, unsigned, unsigned, void**, char*);
    int parameters;
    const char* arrays;
};
struct Argument {
    uint64_t value, elements;
};

// A launch that waits in the default stream.
struct Launch {
    Function function;
    unsigned grid[3], threads;
    std::vector<Argument> arguments;
};

static void run(void* data) {
    auto* launch = (Launch*)data;
    std::vector<void*> arguments;
    for (size_t i = 0; i < launch->arguments.size(); i++) {
        Argument& argument = launch->arguments[i];
        arguments.push_back(launch->function.arrays[i] ? (void*)argument.value : (void*)&argument.value);
        arguments.push_back((void*)argument.elements);
    }
    char error[300];
    const unsigned* grid = launch->grid;
    launch->function.launch(grid[0], grid[1], grid[2], launch->threads, 1, arguments.data(), error);
    if (*error) {
        fprintf(stderr, "emulation: %s\n", error);
        _exit(71);
    }
    delete launch;
}

extern "C" {
int cuLaunchKernel(
    void* function, unsigned gx, unsigned gy, unsigned gz, unsigned threads, unsigned, unsigned, unsigned, void*, void** parameters,
    void**) {
    auto* enqueue = (void (*)(void*, void (*)(void*), void*))dlsym(RTLD_DEFAULT, "sim_gpu_enqueue");
    if (!enqueue) return 3;  // CUDA_ERROR_NOT_INITIALIZED
    auto* launch = new Launch{*(Function*)function, {gx, gy, gz}, threads, {}};
    for (int i = 0; i < launch->function.parameters; i++) launch->arguments.push_back(*(Argument*)parameters[i]);
    enqueue(nullptr, run, launch);
    return 0;
}
int cuInit(unsigned) { return cards().empty() ? 100 : 0; }
int cuDriverGetVersion(int* version) { return *version = (int)number("SIM_GPU_DRIVER", 12040), 0; }
int cuDeviceGetCount(int* count) { return *count = (int)cards().size(), 0; }
int cuDeviceGet(int* device, int number) { return *device = cards()[number], 0; }
int cuDeviceGetName(char* name, int size, int device) {
    return snprintf(name, size, "simulated GPU %d", device), 0;
}
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = memory(), 0; }
int cuDeviceGetPCIBusId(char* bus, int size, int device) { return snprintf(bus, size, "0000:%02d:00.0", device + 1), 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    const int compute = (int)number("SIM_GPU_COMPUTE", 86);
    return *value = attribute == 75 ? compute / 10 : attribute == 76 ? compute % 10 : 1, 0;
}
int nvmlInit_v2() { return 0; }
int nvmlInitWithFlags(unsigned) { return 0; }
int nvmlShutdown() { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** handle) { return *handle = nullptr, 0; }
int nvmlDeviceGetMemoryInfo(void*, Memory* found) { return *found = {memory(), memory(), 0}, 0; }
}
