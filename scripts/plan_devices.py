# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/plan_devices.py --config kimi_linear --block-size 3 --devices 8 16 --gradient-checkpointing

Plans pipelines for a model, without running it: memory per device, bytes sent and the time of a step, for the donor,
Block and Full, and for each schedule (GPipe, 1F1B, and interleaved 1F1B with several stages per device).

Devices that one pipeline doesn't need have replicas of it. What is assumed is said in `scripts/recipes/planning.py`
and above the table.
"""

import json
import shlex

from attnres_recipes.options import PlanOptions
from attnres_recipes.parser import need, parse


def parse_arguments(argv: list[str] | None = None) -> PlanOptions:
    return parse(PlanOptions, "plan_devices", __doc__, argv)


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    need("generate")
    from attnres_convert import reading
    from attnres_convert.writing import write_json, write_text
    from attnres_recipes.process import command  # takes seconds

    with command("plan_devices"):
        from attnres_recipes.planning import plan_devices, report

        plan = plan_devices(options)
        text = report(plan, shlex.join(["python", "scripts/plan_devices.py", *options.words()]))
        if options.output:
            with reading.understood(f"{options.output} can't be written"):
                options.output.parent.mkdir(parents=True, exist_ok=True)
                write_json(options.output.with_name(f"{options.output.name}.json"), plan)
                write_text(options.output.with_name(f"{options.output.name}.md"), text)
    print(text, end="")
    if options.json:
        print(json.dumps(plan))


if __name__ == "__main__":
    main()
