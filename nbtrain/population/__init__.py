"""Population based training that outlives its notebook, here or on Ray.

From the call site down; read `population`, `rounds` and `evolution` first::

    population   Population: members that train in turn, and copy the best
    standing     where one member of it stands
    engines      the loop of a population whose members train at once, on Ray
    tuning       tune_trainable: the same task for Ray Tune
    rounds       the loop of a population
    storing      when a population is saved
    founding     a population at its beginning: found, or new and tried out
    cluster      Ray: workers wherever there is room for them
    worker       slices done in another process
    member       one member, and its part in one round: a slice
    parking      members that wait leave a device that is full
    replaying    a schedule of hyperparameters, trained by one session
    making       what a member is made from: build, with its hyperparameters
    shelf        the states of a population in its stores
    portrait     scores and hyperparameters over time; genealogy draws who copied whom
    ancestry     where a state came from, and the schedule that made it
    table        what is known of a population, as rows; all else follows from them
    evolution    from one round's scores to the next round's turns
    space        where hyperparameters are drawn from
"""
