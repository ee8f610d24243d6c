# Toolchain for aarch64 Linux (AGX Orin, Grace): Debian's and Ubuntu's g++-aarch64-linux-gnu. .ci/cross uses it.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
