"""sparse24 on the CPU against every dense path of torch and onnxruntime: layers, convolutions, whole encoders.

    python -m benchmarks.cpu                       all of it, written to benchmarks/results/cpu-*.json and .png
    python -m benchmarks.cpu --resume              goes on where an interrupted run stopped
    python -m benchmarks.cpu --only linear --shapes 768x3072 --tokens 1 197 --dtypes bfloat16 --threads 1
                                                   a part of it, printed only
    python -m benchmarks.cpu --markdown            the tables of README.md and docs/cpu.md, from the committed results
    python -m benchmarks.cpu --draw                the plots anew, from the committed results

Everything runs through the public operators and modules: the output is allocated by every call, Python is included.
The contenders of a cell are timed in turns in one process, and what is timed is checked first, in the same run.
"""
