"""What a configuration can name, a line each: curvature operators, sources of models, sources of data"""
