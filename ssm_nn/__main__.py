"""``python -m ssm_nn`` is the command ``ssm-nn``."""

from ssm_nn.command_line import main

main()
