// Which of the instruction-set builds runs.
#pragma once
#include <string>
#include <vector>

#include "jobs.h"

// Those that this CPU can run, best first; generic is always there.
std::vector<const KernelTable*> usable_kernels();

// Takes the build of this name for all further calls; false where it is not usable. At first the best one is taken.
bool use_kernels(const std::string& name);
