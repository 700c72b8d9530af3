// A CUDA runtime without a card: what Jittor, our copies and the emulated kernels call, over this machine's memory.
//
// Work is queued and done late, in parts, and in any order that CUDA's rules allow: each stream in its own order, streams against each other
// only through events. All streams but the default one are non-blocking; others are refused. The environment chooses:
//   SIM_GPU_SEED, SIM_GPU_EAGER   the order, and the chance (0 to 1) of another step after each call
//   SIM_GPU_FAVOUR                the streams that mostly go first whenever they can: default, or others
//   SIM_GPU_MEMORY, SIM_GPU_CONTEXT, SIM_GPU_TAKEN  bytes of the card, those that CUDA itself takes, and those that other programs
//                                 do, from the moment on when this one has had SIM_GPU_TAKEN_AFTER; fresh memory is full of NaNs
//   SIM_GPU_COMPUTE               its compute capability, 86 for 8.6
//   SIM_GPU_FORGET                a planted fault: calls of one kind do nothing on streams other than the default one (wait, record,
//                                 copy) or on that (default wait, default record)
// What a card would take ill in silence ends the program: device memory that is none, and pinned memory that is let go under a copy.
// It is compiled with the headers of the simulated toolkit or, for a real nvcc, with NVIDIA's.
#include <cuda_runtime.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

namespace {

struct Event {
    long recorded = 0, happened = 0;
};

struct Work {
    std::deque<std::function<void()>> steps;
    Event* after = nullptr;  // waits for this recording of it
    long recording = 0;
};

struct Stream {
    std::deque<Work> queue;
};

double number(const char* name, double otherwise) {
    const char* text = getenv(name);
    return text && *text ? atof(text) : otherwise;
}

std::string word(const char* name) {
    const char* text = getenv(name);
    return text ? text : "";
}

[[noreturn]] void wrong(const char* what) {
    fprintf(stderr, "simulated GPU: %s\n", what);
    _exit(70);
}

struct Range {
    size_t bytes;
    bool counts = false;  // towards the card's memory
    int reads = 0;        // copies out of it that are queued
};
using Ranges = std::map<char*, Range>;

// The range that holds all of these bytes, if there is one.
Range* holding(Ranges& ranges, const void* at, size_t bytes) {
    auto found = ranges.upper_bound((char*)at);
    if (found == ranges.begin()) return nullptr;
    --found;
    return (char*)at + bytes <= found->first + found->second.bytes ? &found->second : nullptr;
}

struct Device {
    Stream main;
    std::vector<Stream*> streams{&main};
    std::mt19937 random{(unsigned)number("SIM_GPU_SEED", 0)};
    double eager = number("SIM_GPU_EAGER", 0.3);
    const size_t limit = (size_t)number("SIM_GPU_MEMORY", 2e9), others = (size_t)number("SIM_GPU_TAKEN", 0);
    const size_t context = (size_t)number("SIM_GPU_CONTEXT", 0), late = (size_t)number("SIM_GPU_TAKEN_AFTER", 0);
    const std::string favour = word("SIM_GPU_FAVOUR"), forget = word("SIM_GPU_FORGET");
    size_t used = 0, most = 0;
    Ranges pinned, allocated;
    cudaError_t last = cudaSuccess;
    bool running = false;

    // What others than this process's allocations take of the card.
    size_t taken() const { return context + (most >= late ? others : 0); }
    // One part of some stream's first work; false where every stream is empty or waits.
    bool step() {
        std::vector<Stream*> able;
        for (Stream* stream : streams)
            if (!stream->queue.empty()) {
                Work& work = stream->queue.front();
                if (!work.after || work.after->happened >= work.recording) able.push_back(stream);
            }
        if (able.empty()) return false;
        Stream* stream = able[random() % able.size()];
        if (!favour.empty() && random() % 16) stream = favour == "default" ? able.front() : able.back();
        Work& work = stream->queue.front();
        if (!work.steps.empty()) {
            auto step = std::move(work.steps.front());
            work.steps.pop_front();
            running = true;  // a kernel may queue work itself: that its memory goes back
            step();
            running = false;
        }
        if (work.steps.empty()) stream->queue.pop_front();
        return true;
    }
    void add(Stream* stream, Work work) {
        stream->queue.push_back(std::move(work));
        while (!running && std::uniform_real_distribution<>()(random) < eager && step()) {
        }
    }
    void until(const std::function<bool()>& done) {
        while (!done())
            if (!step()) wrong("the host waits for what never comes");
    }
    void drain(Stream* stream) {
        until([&] { return stream->queue.empty(); });
    }
    void drain() {
        for (Stream* stream : streams) drain(stream);
    }
};

Device& device() {
    static Device* one = new Device;
    return *one;
}

Stream* of(cudaStream_t stream) { return stream ? (Stream*)stream : &device().main; }
bool forgotten(const char* kind, cudaStream_t stream) {
    return device().forget == (stream ? std::string(kind) : std::string("default ") + kind);
}
cudaError_t answer(cudaError_t error) {
    if (error != cudaSuccess) device().last = error;
    return error;
}

// A copy, of which each end is where its kind says; it reads pinned memory until it is done.
Work copying(void* target, const void* source, size_t bytes, cudaMemcpyKind kind) {
    Device& d = device();
    if ((kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice) && !holding(d.allocated, target, bytes))
        wrong("a copy to the device, to what is none of its memory");
    if ((kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice) && !holding(d.allocated, source, bytes))
        wrong("a copy from the device, from what is none of its memory");
    Work work;
    const size_t part = bytes / 4 + 1;
    for (size_t at = 0; at < bytes; at += part) {
        const size_t count = std::min(part, bytes - at);
        work.steps.push_back([=] { memcpy((char*)target + at, (const char*)source + at, count); });
    }
    if (Range* pinned = holding(d.pinned, source, bytes)) {
        pinned->reads++;
        work.steps.push_back([=] { pinned->reads--; });
    }
    return work;
}

// Fresh memory, full of NaNs.
cudaError_t allocate(void** memory, Range range, Ranges& into) {
    if (posix_memalign(memory, 512, range.bytes ? range.bytes : 1)) return answer(cudaErrorMemoryAllocation);
    memset(*memory, 0xff, range.bytes);
    into[(char*)*memory] = range;
    return cudaSuccess;
}

}  // namespace

extern "C" {

// For a pool that gives its memory back in the order of the default stream: freeing waits for nobody.
void sim_gpu_free(void* memory) {
    Device& d = device();
    auto found = d.allocated.find((char*)memory);
    if (found->second.counts) d.used -= found->second.bytes;
    memset(memory, 0xff, found->second.bytes);
    d.allocated.erase(found);
    free(memory);
}

// The most bytes that this process's allocations had at once, since it was asked last.
size_t sim_gpu_most() {
    const size_t most = device().most;
    device().most = device().used;
    return most;
}

// Whether an address is the device's, for those who hand out arrays over it.
int sim_gpu_is_device(const void* at, size_t bytes) { return holding(device().allocated, at, bytes) != nullptr; }

// For kernels that are run by somebody else: queue a call.
void sim_gpu_enqueue(cudaStream_t stream, void (*call)(void*), void* data) {
    Work work;
    work.steps.push_back([=] { call(data); });
    device().add(of(stream), std::move(work));
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
    Device& d = device();
    if (d.taken() + d.used + bytes > d.limit) return answer(cudaErrorMemoryAllocation);
    d.used += bytes;
    d.most = std::max(d.most, d.used);
    return allocate(memory, {bytes, true}, d.allocated);
}
cudaError_t cudaMallocManaged(void** memory, size_t bytes, unsigned) { return allocate(memory, {bytes}, device().allocated); }
cudaError_t cudaMallocHost(void** memory, size_t bytes) { return allocate(memory, {bytes}, device().pinned); }
cudaError_t cudaFree(void* memory) {
    device().drain();
    if (!memory) return cudaSuccess;
    if (!holding(device().allocated, memory, 1)) return answer(cudaErrorInvalidValue);
    sim_gpu_free(memory);
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) {
    device().drain();
    device().pinned.erase((char*)memory);
    free(memory);
    return cudaSuccess;
}
cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned) {
    if (holding(device().pinned, memory, 1)) return answer(cudaErrorHostMemoryAlreadyRegistered);
    device().pinned[(char*)memory] = {bytes};
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* memory) {
    auto found = device().pinned.find((char*)memory);
    if (found == device().pinned.end()) return answer(cudaErrorHostMemoryNotRegistered);
    if (found->second.reads) wrong("pinned memory is let go while a copy reads it");
    device().pinned.erase(found);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    Device& d = device();
    if (kind == cudaMemcpyHostToDevice && forgotten("copy", stream)) return cudaSuccess;
    d.add(of(stream), copying(target, source, bytes, kind));
    // Memory that is not pinned may be read before the call returns, and written only then.
    const bool host_in = kind == cudaMemcpyHostToDevice && !holding(d.pinned, source, bytes);
    const bool host_out = kind == cudaMemcpyDeviceToHost && !holding(d.pinned, target, bytes);
    if (host_in || host_out) d.drain(of(stream));
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind kind) {
    device().add(&device().main, copying(target, source, bytes, kind));
    device().drain(&device().main);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
    if (!holding(device().allocated, memory, bytes)) wrong("memory is set that is none of the device's");
    Work work;
    work.steps.push_back([=] { memset(memory, value, bytes); });
    device().add(of(stream), std::move(work));
    return cudaSuccess;
}
cudaError_t cudaMemset(void* memory, int value, size_t bytes) { return cudaMemsetAsync(memory, value, bytes, nullptr); }
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    *total = device().limit;
    const size_t gone = device().taken() + device().used;
    *free = device().limit > gone ? device().limit - gone : 0;
    return cudaSuccess;
}
#if CUDART_VERSION >= 13000
cudaError_t cudaMemAdvise(const void*, size_t, cudaMemoryAdvise, cudaMemLocation) { return cudaSuccess; }
cudaError_t cudaMemPrefetchAsync(const void*, size_t, cudaMemLocation, unsigned, cudaStream_t stream) {
#else
cudaError_t cudaMemAdvise(const void*, size_t, cudaMemoryAdvise, int) { return cudaSuccess; }
cudaError_t cudaMemPrefetchAsync(const void*, size_t, int, cudaStream_t stream) {
#endif
    device().add(of(stream), Work{});
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    if (flags != cudaStreamNonBlocking) return answer(cudaErrorNotSupported);
    auto* made = new Stream;
    device().streams.push_back(made);
    *stream = (cudaStream_t)made;
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    device().drain(of(stream));
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    device().drain(of(stream));
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    auto* known = (Event*)event;
    if (forgotten("wait", stream)) return cudaSuccess;
    Work work;
    work.after = known;
    work.recording = known->recorded;
    device().add(of(stream), std::move(work));
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = (cudaEvent_t) new Event;
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* time, cudaEvent_t, cudaEvent_t) { return *time = 1, cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    auto* known = (Event*)event;
    if (forgotten("record", stream)) return cudaSuccess;
    const long recording = ++known->recorded;
    Work work;
    work.steps.push_back([=] { known->happened = recording; });
    device().add(of(stream), std::move(work));
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    auto* known = (Event*)event;
    const long recording = known->recorded;
    device().until([&] { return known->happened >= recording; });
    return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void* data) {
    sim_gpu_enqueue(stream, call, data);
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    device().drain();
    return cudaSuccess;
}
cudaError_t cudaDeviceReset() { return cudaDeviceSynchronize(); }
cudaError_t cudaGetLastError() {
    cudaError_t error = device().last;
    device().last = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError() { return device().last; }
const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError";
}
const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "an error of the simulated GPU";
}
cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* number) {
    *number = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, "simulated GPU");
    properties->totalGlobalMem = device().limit;
    const int compute = (int)number("SIM_GPU_COMPUTE", 86);
    properties->major = compute / 10;
    properties->minor = compute % 10;
    properties->multiProcessorCount = 1;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

// What nvcc puts into every library with kernels: they are announced, and a launch ends the program.
static int announced;
void** __cudaRegisterFatBinary(void*) { return (void**)&announced; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
cudaError_t __cudaGetKernel(void**, const void*) { return cudaSuccess; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { wrong("one of Jittor's kernels is launched"); }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { wrong("one of Jittor's kernels is launched"); }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { wrong("one of Jittor's kernels is launched"); }
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) { wrong("one of Jittor's kernels is launched"); }

}  // extern "C"
