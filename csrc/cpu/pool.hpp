// A small pool of threads: parts cut beforehand, one fork and one join a call.
#pragma once

namespace fastgd {

int get_num_threads();
void set_num_threads(int n);

constexpr int max_parts = 1024;

// Calls task(context, part) for every part in [0, parts), this thread among the workers. Where the pool is busy with
// another caller, or no thread can be made, this thread does it all.
void parallel(int parts, void (*task)(void* context, int part), void* context);

}  // namespace fastgd
