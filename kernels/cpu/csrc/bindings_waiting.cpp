// Waiting for another process on cores that nobody else needs: looking again and again is sooner than being woken.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <optional>
#include <system_error>
#include <thread>
#include <vector>

namespace nb = nanobind;

namespace {

using Clock = std::chrono::steady_clock;

// Whether any of them is ready; the kernel waits for up to so many milliseconds, -1: for ever.
bool look(std::vector<pollfd>& polled, int timeout_ms) {
    const int count = poll(polled.data(), polled.size(), timeout_ms);
    if (count < 0 && errno != EINTR) throw std::system_error(errno, std::generic_category(), "poll");
    return count > 0;
}

bool wait(std::vector<pollfd>& polled, int64_t spin_ns, int64_t timeout_ns) {
    const Clock::time_point began = Clock::now();
    const auto waited_ns = [&] { return std::chrono::nanoseconds(Clock::now() - began).count(); };
    const int64_t most_ns = timeout_ns < 0 ? spin_ns : std::min(spin_ns, timeout_ns);
    do {
        if (look(polled, 0)) return true;
        std::this_thread::yield();
    } while (waited_ns() < most_ns);
    while (timeout_ns < 0) {
        if (look(polled, -1)) return true;
    }
    for (int64_t left_ns; (left_ns = timeout_ns - waited_ns()) > 0;) {
        if (look(polled, static_cast<int>((left_ns + 999'999) / 1'000'000))) return true;
    }
    return false;
}

std::vector<int> wait_readable(const std::vector<int>& descriptors, int64_t spin_ns, int64_t timeout_ns, bool keeps_gil) {
    std::vector<pollfd> polled;
    for (int descriptor : descriptors) polled.push_back({descriptor, POLLIN, 0});
    {
        std::optional<nb::gil_scoped_release> release;
        if (!keeps_gil) release.emplace();
        wait(polled, spin_ns, timeout_ns);
    }
    std::vector<int> ready;
    for (const pollfd& one : polled) {
        if (one.revents) ready.push_back(one.fd);
    }
    return ready;
}

}  // namespace

void bind_waiting(nb::module_& m) { m.def("wait_readable", wait_readable); }
