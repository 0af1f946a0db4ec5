"""csrc/ops/lion_step/cpu.cpp"""

from peftk.ops.step_lists import native_step

IMPLEMENTATION = native_step("lion_step")
IMPLEMENTATION8 = native_step("lion_step8")
