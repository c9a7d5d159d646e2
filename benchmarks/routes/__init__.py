"""Parts of the benchmarks of routes: who answers, PEFT's ways beside ours, detectors, pictures."""
