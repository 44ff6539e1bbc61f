// A small pool of threads: parts cut beforehand, one fork and one join a call.
#pragma once
#include <stdint.h>

namespace fastgd {

int get_num_threads();
void set_num_threads(int n);

constexpr int max_parts = 1024;

// To be called once: the pool of a process is of no use to its children, which have none of its threads.
void start_anew_in_forked_children();

// How many forks lie between this process and the one that loaded the module.
uint64_t forks();

// Calls task(context, part) for every part in [0, parts), this thread among the workers. Where the pool is busy with
// another caller, or no thread can be made, this thread does it all.
void parallel(int parts, void (*task)(void* context, int part), void* context);

}  // namespace fastgd
