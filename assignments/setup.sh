#!/usr/bin/env bash
# Gradescope runs this once, when it builds the autograder's container.
set -euo pipefail
apt-get update && apt-get install -y python3 python3-pip python3-venv
python3 -m venv /opt/grader
/opt/grader/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu
/opt/grader/bin/pip install -r /autograder/source/requirements.txt
cd /autograder/source && /opt/grader/bin/python assignments/mutants.py  # how known mistakes fail
