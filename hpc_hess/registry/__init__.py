"""What a configuration can name, a line each: curvature operators, tasks, sources of models and of data"""
