# How every C++ file is compiled; CMakeLists.txt and tests/amx_metal include this.

# Results must not depend on which multiplications the compiler fuses, so it fuses none; kernels say fma where they mean it.
set(FLAGS_everywhere -O3 -Wall -Wextra -ffp-contract=off -fno-math-errno)

# The only place where an instruction set is chosen: one file, its flags. Everything else is compiled for the baseline,
# so that detection runs anywhere.
set(FLAGS_scalar -fno-tree-vectorize)
set(FLAGS_avx2 -mavx2 -mfma -mf16c)
set(FLAGS_avx512_vnni ${FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni
    -mprefer-vector-width=512 -Wno-maybe-uninitialized -Wno-uninitialized) # gcc 12 warns of its own intrinsics
set(FLAGS_avx512 ${FLAGS_avx512_vnni} -mavx512vbmi -mavx512bf16)
set(FLAGS_amx ${FLAGS_avx512} -mamx-tile -mamx-bf16 -mamx-int8)

# Adds files of an instruction set to ${ISA_TARGET}.
function(isa_source isa)
  foreach(file IN LISTS ARGN)
    target_sources(${ISA_TARGET} PRIVATE ${file})
    set_source_files_properties(${file} PROPERTIES COMPILE_OPTIONS "${FLAGS_${isa}}")
  endforeach()
endfunction()
