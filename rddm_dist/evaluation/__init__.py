"""From a trained network to restored images, scores that others can reproduce, and pages that show them.

    files of a report   writing
    using a network     restore, generate
    what is compared    protocol, metrics, color, resize; of whole sets: features, networks, distribution
    the work            sources (images), job (units and their names), runner (one worker), allocator,
                        results (Parquet), cases (pictures), evaluate (from plan to outcome)
    what came out       statistics, summary (the object of report.json), curve, baseline
    pages               report, demo_report, score_table, gallery, figures, charts, wording, page, page_script
    side by side        compare, compare_reports, compare_formats

A module imports those of its own line and of the lines above. Nothing here knows where units run.
"""
