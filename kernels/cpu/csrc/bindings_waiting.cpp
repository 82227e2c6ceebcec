// Waiting for another process on cores that nobody else needs: looking again and again is sooner than being woken.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <system_error>
#include <thread>
#include <vector>

#include "mailbox.h"
#include "rest.h"

namespace nb = nanobind;

namespace {

using Clock = std::chrono::steady_clock;

// Between two system calls; they take some microseconds.
constexpr int kLooks = 64;
// For so long the core is given to nobody: another thread keeps what it is given for a millisecond or two.
constexpr int64_t kPatienceNs = 4'000'000;

// What is waited for: files, and memory that costs next to nothing to look at.
class Waiting {
   public:
    Waiting(const std::vector<int>& descriptors, const std::vector<Mailbox*>& mailboxes) : mailboxes_(mailboxes) {
        for (int descriptor : descriptors) polled_.push_back({descriptor, POLLIN, 0});
    }

    void wait(int64_t spin_ns, int64_t timeout_ns) {
        const Clock::time_point began = Clock::now();
        const auto waited_ns = [&] { return std::chrono::nanoseconds(Clock::now() - began).count(); };
        const int64_t most_ns = timeout_ns < 0 ? spin_ns : std::min(spin_ns, timeout_ns);
        while (true) {
            if (is_any_full() || is_readable(0)) return;
            if (waited_ns() >= most_ns) break;
            for (int i = 0; !mailboxes_.empty() && i < kLooks; ++i) {
                if (is_any_full()) return;
                rest();
            }
            if (waited_ns() > kPatienceNs) std::this_thread::yield();
        }
        if (timeout_ns >= 0 && waited_ns() >= timeout_ns) return;
        set_asleep(true);
        sleep(timeout_ns, waited_ns);
        set_asleep(false);
    }

    // Each descriptor once: with something to read there, or in its mailbox.
    std::vector<int> readable() const {
        std::vector<int> found;
        for (const Mailbox* one : mailboxes_) {
            if (one->is_full()) found.push_back(one->descriptor);
        }
        for (const pollfd& one : polled_) {
            if (one.revents && std::find(found.begin(), found.end(), one.fd) == found.end()) found.push_back(one.fd);
        }
        return found;
    }

   private:
    // The kernel waits for up to so many milliseconds, -1: for ever.
    bool is_readable(int timeout_ms) {
        const int count = poll(polled_.data(), polled_.size(), timeout_ms);
        if (count < 0 && errno != EINTR) throw std::system_error(errno, std::generic_category(), "poll");
        return count > 0;
    }

    bool is_any_full() const {
        return std::any_of(mailboxes_.begin(), mailboxes_.end(), [](const Mailbox* one) { return one->is_full(); });
    }

    void set_asleep(bool sleeps) const {
        for (Mailbox* one : mailboxes_) one->set_asleep(sleeps);
    }

    template <typename Waited>
    void sleep(int64_t timeout_ns, Waited&& waited_ns) {
        while (!is_any_full()) {
            const int64_t left_ns = timeout_ns < 0 ? 0 : timeout_ns - waited_ns();
            if (timeout_ns >= 0 && left_ns <= 0) return;
            if (is_readable(timeout_ns < 0 ? -1 : int((left_ns + 999'999) / 1'000'000))) return;
        }
    }

    std::vector<pollfd> polled_;
    const std::vector<Mailbox*>& mailboxes_;
};

std::vector<int> wait_readable(const std::vector<int>& descriptors, const std::vector<Mailbox*>& mailboxes,
                               int64_t spin_ns, int64_t timeout_ns) {
    Waiting waiting(descriptors, mailboxes);
    nb::gil_scoped_release release;
    waiting.wait(spin_ns, timeout_ns);
    return waiting.readable();
}

}  // namespace

void bind_waiting(nb::module_& m) {
    nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
        try {
            std::rethrow_exception(thrown);
        } catch (const std::system_error& error) {
            errno = error.code().value();
            PyErr_SetFromErrno(PyExc_OSError);
        }
    });
    nb::class_<Mailbox>(m, "Mailbox")
        .def(nb::init<int, int, bool>())
        .def_ro("descriptor", &Mailbox::descriptor)
        .def_prop_ro("has_reader", &Mailbox::has_reader)
        .def("post", [](Mailbox& mailbox, nb::bytes message, uint64_t after) {
            return mailbox.post(message.c_str(), message.size(), after);
        })
        .def("take", [](Mailbox& mailbox, uint64_t after) {
            nb::object found = nb::none();
            mailbox.take(after, [&](const char* bytes, size_t size) { found = nb::bytes(bytes, size); });
            return found;
        });
    m.def("wait_readable", wait_readable);
}
