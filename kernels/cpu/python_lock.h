// Jittor computes with Python's lock held. Where a server answers beside the engine, an operation lets go of it: nobody there
// would be told anything for as long as a block of a long text takes.
#pragma once

extern "C" {
struct _ts;
_ts* PyEval_SaveThread();
void PyEval_RestoreThread(_ts*);
}

namespace moss {

class Unlocked {
    _ts* const state;

public:
    explicit Unlocked(bool wanted) : state(wanted ? PyEval_SaveThread() : nullptr) {}
    ~Unlocked() {
        if (state) PyEval_RestoreThread(state);
    }
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;
};

}  // namespace moss
