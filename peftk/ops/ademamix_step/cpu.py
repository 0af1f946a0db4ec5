"""csrc/ops/ademamix_step/cpu.cpp"""

from peftk.ops.step_lists import native_step

IMPLEMENTATION = native_step("ademamix_step")
IMPLEMENTATION8 = native_step("ademamix_step8")
