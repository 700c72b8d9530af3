// Weights are mapped files. Where a file becomes shorter while it is in use, the system sends SIGBUS to whoever reads
// what is gone, be it a thread in the middle of a product: nothing can be computed any more, but it can be said.
#pragma once

#include <signal.h>
#include <unistd.h>

#include <atomic>

namespace moss {

inline std::atomic_flag lost_file_is_being_told = ATOMIC_FLAG_INIT;

inline void say_lost_file(int) {
    while (lost_file_is_being_told.test_and_set()) pause();  // several threads come here at once; one speaks
    const char text[] =
        "moss-jt: error: a file of the model became shorter while it was in use (SIGBUS). Check the model with moss-jt "
        "verify; the same moss-jt convert again makes anew what is damaged.\n";
    const auto written = write(STDERR_FILENO, text, sizeof text - 1);
    _exit(written < 0 ? 2 : 1);
}

// When an operator is loaded. A handler that somebody else installed (a debugger, Python's faulthandler) stays.
inline const bool lost_file_is_told = [] {
    struct sigaction now;
    if (sigaction(SIGBUS, nullptr, &now) == 0 && now.sa_handler == SIG_DFL) signal(SIGBUS, say_lost_file);
    return true;
}();

}  // namespace moss
