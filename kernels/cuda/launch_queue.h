// The launches of a block or of the head, one after the other, from a table that kernels/cuda/recording.py wrote once.
//
// Nothing here is CUDA's own: the driver's cuLaunchKernel comes as an address, so that the tests can pass the emulated kernels instead.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace moss_launch {

// cuLaunchKernel: the function, three sizes of the grid and three of a block, shared memory, stream, arguments, and a null pointer.
using Launch = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);

// As in recording.py. What an argument of the table is: a number, or an array in one of the operation's memories.
enum Kind { kNumber, kArray };

// A card reads the value only; the tests' emulation also asks how many elements an array has.
struct Argument {
    uint64_t value, elements;
};

constexpr int kMostArguments = 32;
constexpr int kOutOfMemory = 2;  // CUDA_ERROR_OUT_OF_MEMORY

// table: the number of launches; for each its function, the grid, the threads of a block and the number of arguments, and for each of
// those its kind, memory, value or offset in bytes, number of elements, and the bytes by which it moves on with each layer.
inline void run(const int64_t* table, Launch launch, char* const* memories, int64_t layer) {
    Argument arguments[kMostArguments];
    void* parameters[kMostArguments];
    for (int64_t left = *table++; left > 0; left--) {
        const int64_t* head = table;
        const int64_t count = head[5];
        table += 6;
        for (int64_t i = 0; i < count; i++, table += 5) {
            uint64_t value = (uint64_t)table[2];
            if (table[0] == kArray) value = (uint64_t)(uintptr_t)(memories[table[1]] + table[2] + layer * table[4]);
            arguments[i] = {value, (uint64_t)table[3]};
            parameters[i] = &arguments[i];
        }
        const int error = launch(
            (void*)(uintptr_t)head[0], (unsigned)head[1], (unsigned)head[2], (unsigned)head[3], (unsigned)head[4], 1, 1, 0, nullptr,
            parameters, nullptr);
        if (error == kOutOfMemory) throw std::runtime_error("moss-jt: cuLaunchKernel: out of memory");
        if (error) throw std::runtime_error("moss-jt: cuLaunchKernel: error " + std::to_string(error));
    }
}

}  // namespace moss_launch
