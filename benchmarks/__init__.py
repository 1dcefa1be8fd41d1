"""Vision-language benchmarks as lm-eval tasks, and the code that runs and compares them.

Each folder is one benchmark: a YAML that lm-eval reads, a scorer and a README. The scorers import nothing from
this project, so that `lm_eval --include_path benchmarks --tasks textvqa_vlm` works on its own.
"""
