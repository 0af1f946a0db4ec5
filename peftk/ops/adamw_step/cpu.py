"""csrc/ops/adamw_step/cpu.cpp"""

from peftk.ops.step_lists import native_step

IMPLEMENTATION = native_step("adamw_step")
IMPLEMENTATION8 = native_step("adamw_step8")
