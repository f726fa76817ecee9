# SPDX-License-Identifier: Apache-2.0
"""What can be made of videos, one module each: a model's results, and how a video goes through it (`pyvseg.engine.task.Task`)."""
