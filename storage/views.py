"""What people can ask: the tables in words, and the views that answer the usual questions, as data."""

from __future__ import annotations

from dataclasses import dataclass

DESCRIPTIONS = {
    "manifest": "what the images are: path, digest, size and label; `images` adds the target",
    "targets": "the class that every explanation of an image is about, fixed by the predict stage",
    "predictions": "the model's first classes of every image, rank 1 the most probable",
    "parts": "the parts of every image: area in pixels and bounding box",
    "part_scores": "every method's score of every part, with kl_hessian's own terms",
    "true_masks": "how many of every image's pixels are the object's, or not; reason where nothing is known",
    "true_parts": "the parts that the demo drew: pixels in sight, and what each adds to the target's logit",
    "metrics": "every metric of every method on every image; value is null where it is undefined, reason says why",
    "curves": "the points of the perturbation curves that stand behind the metrics",
    "concepts": "the concepts of every dictionary, with its fit",
    "sae_training": "the log of each sparse autoencoder's training: loss, Rel-l2, active and dead latents",
    "training": "the log of what is trained: means of every epoch, over pictures learnt from, held out or tested",
    "importance_accuracy": "whether a network is right on every image as it is (direction own, threshold null), "
    "without the patches below a threshold (insertion) or from it on (deletion); masked: their share",
    "importance_scores": "sparsity of each network's importance, agreement with masks, and variation over seeds "
    "(reproducibility; network then names the set); value is null where it is undefined, reason says why",
    "concept_exemplars": "the sampled vectors nearest to every concept, rank 0 the nearest, and where they stand",
    "concept_scores": "what an image's most important concepts do for its class, layer by layer, in logits",
    "concept_edges": "what concepts of one layer do for those of the next, or for the class, image by image",
    "concept_insertion": "how faithful each attribution of edges is: areas under concept insertion and deletion",
    "concept_curves": "the points of the curves behind concept_insertion",
    "cafe": "latents on their strongest images: how well each attributor's evidence brings them back",
    "timings": "seconds and peak memory of every unit of work",
    "quarantine": "images that a stage could not treat, and why",
    "runs": "one row a run: state, model, config, versions",
    "metric_info": "what every metric is: family, direction, bounds, unit, definition, source",
    "method_info": "what every method is: output, definition, equation, source",
}


# Stores of earlier versions tell no reasons.
UNTOLD = "no reason kept"


@dataclass(frozen=True)
class View:
    """A named question: ``sql`` may use the tables and the views before it."""

    name: str
    description: str
    sql: str


# Values of metrics that have a direction, turned so that more merit is always better.
MERITS = """
merits as (
    select run_id, image_id, method, metric, value, if(higher_is_better, value, -value) as merit
    from metrics join metric_info using (run_id, metric)
    where isfinite(value) and higher_is_better is not null
)
"""

IMAGES = View(
    "images",
    "every image with its label, its target and whether the model is right",
    """
select m.*, t.target, t.target_name, t.correct
from manifest m left join targets t using (run_id, image_id)
""",
)

# Sums depend on the order of the rows in their last bits, so means that agree as single precision numbers tie.
LEADERBOARD = View(
    "leaderboard",
    "mean and standard error of every method on every metric over its defined values, and why others are missing; "
    "rank 1 is best, equal means share a rank; no rank without a direction or a value",
    f"""
with why as (
    select run_id, method, metric, coalesce(reason, '{UNTOLD}') as reason, count(*) as images
    from metrics
    where value is null or not isfinite(value)
    group by all
),
told as (
    select
        run_id, method, metric,
        string_agg(reason || ': ' || images, '; ' order by images desc, reason) as reasons
    from why
    group by all
),
means as (
    select
        run_id, method, metric,
        favg(value) filter (isfinite(value)) as mean,
        stddev_samp(value) filter (isfinite(value)) / sqrt(count(*) filter (isfinite(value))) as standard_error,
        count(*) filter (isfinite(value)) as images,
        count(*) - count(*) filter (isfinite(value)) as nulls
    from metrics
    group by all
),
directed as (
    select
        means.*, higher_is_better,
        coalesce(try_cast(mean as float)::double, mean) * if(higher_is_better, 1, -1) as merit
    from means left join metric_info using (run_id, metric)
)
select
    run_id, method, metric, mean, standard_error, images, nulls, reasons, higher_is_better,
    if(higher_is_better is null or merit is null, null,
       rank() over (partition by run_id, metric order by merit desc nulls last)) as rank
from directed left join told using (run_id, method, metric)
order by run_id, metric, rank nulls last, method
""",
)

BEST_METHOD_PER_IMAGE = View(
    "best_method_per_image",
    "the method with the best value on every image and metric; where several tie, a row for each, counted in "
    "tied; methods counts those with a value",
    f"""
with {MERITS},
best as (
    select run_id, metric, image_id, max(merit) as merit, count(*) as methods
    from merits
    group by all
),
winners as (
    select
        merits.run_id, merits.metric, merits.image_id, merits.method, merits.value, best.methods,
        count(*) over (partition by merits.run_id, merits.metric, merits.image_id) as tied
    from merits join best using (run_id, metric, image_id, merit)
)
select w.run_id, w.metric, w.image_id, i.path, w.method, w.value, w.methods, w.tied
from winners w left join images i using (run_id, image_id)
order by w.run_id, w.metric, w.image_id, w.method
""",
)

DISAGREEMENTS = View(
    "disagreements",
    "images on which methods differ, by metric; place 1 is the widest gap; leader_differs where no method that is "
    "best on the image leads the leaderboard",
    f"""
with {MERITS},
leaders as (
    select run_id, metric, list(method) as methods, string_agg(method, ' | ' order by method) as leader
    from leaderboard
    where rank = 1
    group by all
),
rivals as (
    select merits.*, leader, list_contains(leaders.methods, method) as leads
    from merits join leaders using (run_id, metric)
),
spread as (
    select
        run_id, metric, image_id, leader,
        first({{method: method, value: value, leads: leads}} order by merit desc, leads desc, method) as best,
        first({{method: method, value: value}} order by merit, leads, method) as worst,
        max(merit) - min(merit) as gap
    from rivals
    group by all
    having gap > 0
)
select
    s.run_id, s.metric,
    row_number() over (partition by s.run_id, s.metric order by s.gap desc, s.image_id) as place,
    s.image_id, i.path,
    s.best.method as best_method, s.best.value as best_value,
    s.worst.method as worst_method, s.worst.value as worst_value,
    s.gap, s.leader, not s.best.leads as leader_differs
from spread s left join images i using (run_id, image_id)
order by s.run_id, s.metric, place
""",
)

WORST_IMAGES = View(
    "worst_images",
    "the images on which a method does worst, by metric; place 1 is the worst, ties in the order of image_id; at "
    "most 100 for each",
    f"""
with {MERITS},
placed as (
    select
        run_id, method, metric, image_id, value,
        row_number() over (partition by run_id, method, metric order by merit, image_id) as place
    from merits
    qualify place <= 100
)
select
    p.run_id, p.method, p.metric, p.place, p.image_id, i.path, i.label, i.label_name, i.target, i.target_name,
    i.correct, p.value
from placed p left join images i using (run_id, image_id)
order by p.run_id, p.metric, p.method, p.place
""",
)

# Each pair is joined once and then turned round: the join is what takes the time.
PAIRED_DIFFERENCES = View(
    "paired_differences",
    "method_a minus method_b on the images where both have a value, every pair both ways round, with the normal "
    "95 % interval of the mean; winner is the better one where the interval excludes 0",
    """
with pairs as (
    select
        a.run_id, a.metric, a.method as method_a, b.method as method_b,
        count(*) as images,
        favg(a.value - b.value) as mean_difference,
        stddev_samp(a.value - b.value) / sqrt(count(*)) as standard_error
    from metrics a join metrics b using (run_id, metric, image_id)
    where a.method < b.method and isfinite(a.value) and isfinite(b.value)
    group by all
),
both_ways as (
    from pairs
    union all by name
    select
        run_id, metric, method_b as method_a, method_a as method_b, images,
        -mean_difference as mean_difference, standard_error
    from pairs
),
bounded as (
    select
        *,
        mean_difference - 1.96 * standard_error as low,
        mean_difference + 1.96 * standard_error as high
    from both_ways
)
select
    run_id, metric, method_a, method_b, images, mean_difference, standard_error, low, high, higher_is_better,
    case
        when higher_is_better is null then null
        when low > 0 then if(higher_is_better, method_a, method_b)
        when high < 0 then if(higher_is_better, method_b, method_a)
    end as winner
from bounded left join metric_info using (run_id, metric)
order by run_id, metric, method_a, method_b
""",
)

VIEWS = (IMAGES, LEADERBOARD, PAIRED_DIFFERENCES, BEST_METHOD_PER_IMAGE, DISAGREEMENTS, WORST_IMAGES)
