// The team: one persistent set of threads for all kernels of the process. The caller of a run is its first member, the
// others spin for a moment and then sleep between runs. Made at its first use, and again in a forked child, which
// inherits no threads. All of this is compiled once, never per instruction set.
#pragma once
#include <cstdint>
#include <functional>

class Team;

// A member of the team within one run. All members must call the same barriers and shares in the same order.
class Worker {
   public:
    const int index, count;

    Worker(Team* team, int index, int count) : index(index), count(count), team_(team) {}
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;

    // Returns when every member has come here; what they wrote before is then visible to all.
    void barrier();

    // Calls body(begin, end) until all of [0, units) is done, units < 2^32, and ends with a barrier. Every member has a
    // fixed part, the same in every run with as many units, and goes through it in pieces that get smaller; who is done
    // takes from the others' parts, so that a member that lost its core holds up one piece and not its whole part.
    template <typename F>
    void share(int64_t units, F&& body) {
        if (count == 1) {
            if (units > 0) body(int64_t(0), units);
            return;
        }
        ++round_;
        for (int i = 0; i < count; ++i) {
            const int owner = index + i < count ? index + i : index + i - count;
            for (int64_t begin, end; take(owner, units, begin, end);) body(begin, end);
        }
        barrier();
    }

   private:
    bool take(int owner, int64_t units, int64_t& begin, int64_t& end);

    Team* team_;
    uint32_t round_ = 0;  // shares of this run so far
};

// The number of members, 1 at first. Waits for a run in progress, and ends the threads there are.
void set_team_size(int count);
int team_size();

// How long a member spins before it sleeps: at a barrier, and for the next run. With no time for the latter the team
// parks at once after a run and leaves the cores to other processes. The times are those of a sleep and a wake-up: where
// others need the cores, or there are fewer than members, spinning longer keeps those waiting who are waited for.
void set_team_spin(int64_t barrier_ns, int64_t idle_ns);
constexpr int64_t kBarrierSpinNs = 15'000, kIdleSpinNs = 15'000;

// This thread works alone from now on, to its end: what it does beside the team's runs does not hold them up.
void stay_out_of_team();

// Calls body on every member at once and returns when all are done. A second caller waits for its turn; a call from
// within a run gets a worker of its own that is alone. body must not throw.
void run_team(const std::function<void(Worker&)>& body);

// For single operations: calls body(begin, end) over pieces of [0, count), each item costing about `cost` operations. All
// is done by the caller alone when there is too little work to share, or the team is busy. body must not throw.
void parallel_for(int64_t count, int64_t cost, const std::function<void(int64_t, int64_t)>& body);
