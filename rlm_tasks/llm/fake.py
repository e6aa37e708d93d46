"""The old path of `rlm_tasks.testing.fake_provider`; it works for one more version."""

import runpy

from rlm_tasks.moved import forward

__getattr__ = forward("rlm_tasks.llm.fake")

if __name__ == "__main__":
    runpy.run_module("rlm_tasks.testing.fake_provider", run_name="__main__", alter_sys=True)
