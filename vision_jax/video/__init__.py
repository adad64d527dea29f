"""Watches videos: frames in, boxes, tracks, rules, and alarms that people can trust out.

frames.py     a source as frames with their times: a file, a folder, a camera, an RTSP address
decoder.py    the process that decodes, so that a hostile file is an error and no crash
detect.py     frames -> boxes, in batches of fixed shapes, by any detector
track.py      boxes -> tracks with identities
rules.py      zones, lines and rules out of a TOML file; geometry.py and schedule.py are theirs
alarms.py     tracks and rules -> alarms that begin and end
events.py     what was seen and raised as JSON lines: log, resume, replay
"""
