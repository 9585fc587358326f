"""What a configuration can name, a line each: curvature operators"""
