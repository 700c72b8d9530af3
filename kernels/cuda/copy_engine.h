// Copies from the host beside the computation: what kernels/cuda/copy_engine.py asks for, as calls of the CUDA runtime.
//
// Two queues: the computation's is the default stream, where Jittor and CuPy put their kernels; the copies' is a stream that does not
// wait for it. What one must know of the other goes through events.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace moss_copy {

// As in copy_engine.py.
enum Command { kCopy, kRecord, kWait, kSynchronize, kPin, kUnpin, kReadMostly, kPrefetch };
enum Queue { kCompute, kCopies };

inline void check(cudaError_t error, const char* call) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or the next call would report it again
    throw std::runtime_error(std::string("moss-jt: ") + call + ": " + cudaGetErrorString(error));
}

inline cudaStream_t stream(int queue) {
    static cudaStream_t copies = nullptr;
    if (queue == kCompute) return nullptr;
    if (!copies) check(cudaStreamCreateWithFlags(&copies, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    return copies;
}

// Events are made when they are first named, and stay: a ring has a few, a process a few rings.
inline cudaEvent_t event(size_t number) {
    static std::vector<cudaEvent_t> events;
    while (events.size() <= number) {
        cudaEvent_t made;
        check(cudaEventCreateWithFlags(&made, cudaEventDisableTiming), "cudaEventCreateWithFlags");
        events.push_back(made);
    }
    return events[number];
}

inline int device() {
    int number = 0;
    check(cudaGetDevice(&number), "cudaGetDevice");
    return number;
}

#if CUDART_VERSION >= 13000
inline cudaMemLocation location() { return cudaMemLocation{cudaMemLocationTypeDevice, device()}; }
inline cudaError_t prefetch(void* memory, size_t bytes, cudaStream_t on) {
    return cudaMemPrefetchAsync(memory, bytes, location(), 0, on);
}
#else
inline int location() { return device(); }
inline cudaError_t prefetch(void* memory, size_t bytes, cudaStream_t on) {
    return cudaMemPrefetchAsync(memory, bytes, location(), on);
}
#endif

// memory: on the device; host: an address there.
inline void run(int command, int queue, size_t number, char* memory, size_t offset, void* host, size_t bytes) {
    switch (command) {
        case kCopy:
            check(
                cudaMemcpyAsync(memory + offset, host, bytes, cudaMemcpyHostToDevice, stream(kCopies)), "cudaMemcpyAsync");
            break;
        case kRecord: check(cudaEventRecord(event(number), stream(queue)), "cudaEventRecord"); break;
        case kWait: check(cudaStreamWaitEvent(stream(queue), event(number), 0), "cudaStreamWaitEvent"); break;
        case kSynchronize: check(cudaEventSynchronize(event(number)), "cudaEventSynchronize"); break;
        case kPin: check(cudaHostRegister(host, bytes, cudaHostRegisterDefault), "cudaHostRegister"); break;
        case kUnpin: check(cudaHostUnregister(host), "cudaHostUnregister"); break;
        case kReadMostly:
            check(cudaMemAdvise(memory, bytes, cudaMemAdviseSetReadMostly, location()), "cudaMemAdvise");
            break;
        case kPrefetch: check(prefetch(memory, bytes, stream(kCopies)), "cudaMemPrefetchAsync"); break;
        default: throw std::runtime_error("moss-jt: no such command");
    }
}

}  // namespace moss_copy
