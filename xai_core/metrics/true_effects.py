"""Agreement with the true effects of parts, known where a scene can be drawn again without one."""
