// Sets how many threads the kernels use in a native test (two at first).
#pragma once

namespace sparse24::test {

void set_thread_count(int count);

}  // namespace sparse24::test
