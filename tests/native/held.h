// Counts what is mapped, as our scratch memory is, or allocated with an alignment, as oneDNN's buffers are. Include it before
// the kernels. Compiled with a sanitizer, which has allocators of its own, it counts nothing.
#pragma once

#include <errno.h>
#include <malloc.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>

#include "simd.h"

#ifndef __SANITIZE_ADDRESS__

extern "C" void* __libc_memalign(size_t, size_t);
extern "C" void __libc_free(void*);

struct Held {
    std::mutex mutex;
    void* pointers[4096];
    size_t sizes[4096], now = 0, most = 0;
    int count = 0;
    void* take(void* p, size_t bytes) {
        std::lock_guard<std::mutex> lock(mutex);
        if (!p || count == 4096) abort();
        pointers[count] = p;
        sizes[count++] = bytes;
        now += bytes;
        most = std::max(most, now);
        return p;
    }
    void drop(void* p) {
        std::lock_guard<std::mutex> lock(mutex);
        for (int i = count - 1; i >= 0; i--)
            if (pointers[i] == p) {
                now -= sizes[i];
                pointers[i] = pointers[--count];
                sizes[i] = sizes[count];
                return;
            }
    }
};
static Held held;

extern "C" int posix_memalign(void** p, size_t alignment, size_t bytes) {
    *p = held.take(__libc_memalign(alignment, bytes), bytes);
    return 0;
}
static void* counted_mmap(void* at, size_t bytes, int protection, int flags, int file, off_t offset) {
    return held.take(mmap(at, bytes, protection, flags, file, offset), bytes);
}
static int counted_munmap(void* p, size_t bytes) {
    held.drop(p);
    return munmap(p, bytes);
}
// Ours only: oneDNN maps what it compiles.
#define mmap counted_mmap
#define munmap counted_munmap
extern "C" void free(void* p) {
    if (p) held.drop(p);
    __libc_free(p);
}
static size_t most_held() { return held.most; }
static size_t held_now() { return held.now; }

#else

static size_t most_held() { return 0; }
static size_t held_now() { return 0; }

#endif
