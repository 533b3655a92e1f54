"""Ways to run the steps, one file each: ``run(steps, do, workers)`` calls ``do(step)`` once for every step."""
