# Toolchain of CMake presets: the C++ compiler in PyPI's ziglang, for the target TICKETKIT_ZIG_TARGET. The interpreter that has the package
# is $TICKETKIT_PYTHON, else python3.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES TICKETKIT_ZIG_TARGET)
set(python "$ENV{TICKETKIT_PYTHON}")
if(NOT python)
  set(python python3)
endif()
set(CMAKE_CXX_COMPILER "${python}" -m ziglang c++ -target ${TICKETKIT_ZIG_TARGET})
set(CMAKE_CXX_FLAGS_INIT "-fno-sanitize=undefined")  # zig adds it by itself where it does not optimise
set(CMAKE_EXE_LINKER_FLAGS_INIT "-s")  # it leaves debug information in
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-s")
