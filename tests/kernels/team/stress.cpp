// Runs the team hard and prints "ok", or what went wrong: THREADS ROUNDS BARRIER_NS IDLE_NS.
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "team.h"

namespace {

// The thread sanitizer cannot follow a fork of several threads.
#if defined(__SANITIZE_THREAD__)
constexpr int kForks = 0;
#else
constexpr int kForks = 10;
#endif

int failures = 0;

void check(bool holds, const char* what) {
    if (holds) return;
    std::printf("wrong: %s\n", what);
    ++failures;
}

// Shares of all sizes one after the other: each unit once, and all of it visible to every member after the barrier.
void shares_in_a_row(int rounds) {
    std::vector<int> done(300), seen_short(64);
    for (int round = 0; round < rounds; ++round) {
        const int ops = round % 7 + 1;
        std::fill(done.begin(), done.end(), 0);
        run_team([&](Worker& worker) {
            for (int op = 0; op < ops; ++op) {
                const int units = (round * 31 + op * 17) % 300;
                worker.share(units, [&](int64_t begin, int64_t end) {
                    for (int64_t u = begin; u < end; ++u) done[size_t(u)] += 1 << op;
                });
                for (int u = 0; u < units; ++u)
                    if (!(done[size_t(u)] & 1 << op)) ++seen_short[size_t(worker.index)];
                worker.barrier();
            }
        });
        for (int u = 0; u < 300; ++u) {
            int wanted = 0;
            for (int op = 0; op < ops; ++op) wanted += u < (round * 31 + op * 17) % 300 ? 1 << op : 0;
            check(done[size_t(u)] == wanted, "a unit was left out or done twice");
        }
    }
    for (const int times : seen_short) check(times == 0, "a member did not see what was done before the barrier");
}

// A member that comes late must not hold up its part: the others take it from the front.
void a_late_member_is_helped() {
    if (team_size() == 1) return;
    std::atomic<int> done{0};
    std::atomic<int> at_return{-1};
    run_team([&](Worker& worker) {
        if (worker.index == 0) {
            while (done < 1000) std::this_thread::yield();
            at_return = done.load();
        }
        worker.share(1000, [&](int64_t begin, int64_t end) { done += int(end - begin); });
    });
    check(at_return == 1000, "the others did not do a late member's part");
}

// Callers of several threads, nested calls, single operations, changes of size, and forks, all at once.
void everything_at_once(int threads, int rounds) {
    std::atomic<int64_t> sum{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller)
        callers.emplace_back([&, caller] {
            for (int i = 0; i < rounds; ++i) {
                if (caller == 3 && i % 20 == 0) set_team_size(1 + i / 20 % threads);
                run_team([&](Worker& worker) {
                    worker.share(50, [&](int64_t begin, int64_t end) {
                        sum += end - begin;
                        run_team([&](Worker& alone) { alone.share(1, [&](int64_t, int64_t) {}); });
                        parallel_for(3, 1 << 24, [&](int64_t, int64_t) {});
                    });
                });
                parallel_for(50, 1 << 20, [&](int64_t begin, int64_t end) { sum += end - begin; });
            }
        });
    for (int i = 0; i < kForks; ++i) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(60);
            std::atomic<int64_t> mine{0};
            for (int run = 0; run < 20; ++run)
                run_team([&](Worker& worker) { worker.share(100, [&](int64_t begin, int64_t end) { mine += end - begin; }); });
            _exit(mine == 2000 ? 0 : 1);
        }
        int status = -1;
        waitpid(child, &status, 0);
        check(status == 0, "the team does not work in a forked child");
    }
    for (auto& caller : callers) caller.join();
    check(sum == int64_t(4) * rounds * 100, "units were lost among several callers");
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 5) return 2;
    const int threads = std::atoi(argv[1]), rounds = std::atoi(argv[2]);
    set_team_size(threads);
    set_team_spin(std::atol(argv[3]), std::atol(argv[4]));
    shares_in_a_row(rounds);
    a_late_member_is_helped();
    everything_at_once(threads, rounds / 10);
    set_team_size(0);
    check(team_size() == 1, "a team has at least one member");
    if (!failures) std::puts("ok");
    return failures != 0;
}
