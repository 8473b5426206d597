from nvembed.eval.quiet import quiet_imports


quiet_imports()
