"""Watches videos and raises alarms by rules.

The loop, in the order that the data flows. `Stream` is what one source keeps between frames; what
it calls is pure, or a file that it appends to:

    for frames in batches of the sources' frames:          video/frames.py
        for frame, found in detector.run(frames):          video/detect.py
            state.tracks, tracks = track.update(state.tracks, found, frame.time)
            state.alarms, events = alarms.update(state.alarms, tracks, frame.time, size)
            for event in events: log.append(event)         video/events.py, clips.py
"""
