"""The tier that outlives the process: files of pages and states, and an index of what they are.

**What lies there.** Files in safetensors' format, each written once and never changed:

    pages    a run of pages of one prefix, those that were not there yet
    state    the recurrent state at the end of a page
    end      the state at the end of a whole prompt, with its last partial page and its last hidden row
    message  of a choreography: rows of its tokens, what they do to the states, and the states that they leave

and one SQLite database (WAL) with a row for each: the *identity* of the model (weights, type of numbers, layout, grid,
and a digest of what its kernels make of a probe), namespace, the chained name of the prefix, position, size, and a
checksum of the payload. A name says all tokens and the tenant's salt, so it is all that a prompt is looked up by.

**Who does what.** This package decides and holds integers and names; `storage` holds bytes and threads, `device.disk`
copies between them and the arena, and neither decides anything.

    entries    what a file is, and the header that it must begin with
    index      the database: what is there, in which order it goes, who writes. Used on the storage's thread
    catalogue  the same in memory, by name: what a prompt finds, without waiting for a disk
    saving     what is copied to the disk and when: behind the passes, or when it has to leave memory
    loading    what a waiting prompt is to get from there, and how it enters the tree or the store of messages
    tier       the four together, as the books and the scheduler see them

**Writing.** A state that was published waits in line. Between two steps the tier has some copied (`Save`), and a thread
writes them: reserve the bytes in the index, write a temporary file, fsync, rename, fsync the folder, commit the row.
While requests run, copies and the thread's processor time stay within a small share of the time; while nobody waits,
the line is worked off at once. What is evicted from memory before its turn is copied then, and written if it is worth
more than what it would displace. What is not written is counted.

**Reading.** Where the match of a waiting prompt ends, the catalogue is asked for a deeper state. If it comes faster
than it can be computed, by measured rates, a thread reads and checks the files while others run; then the pages and the
state enter the tree like those of a finished pass, and the prompt is matched again. A load that takes longer than
computing is given up. Nothing waits for a disk but that prompt.

**Doubt.** Header, size and checksum are compared before a byte is used. Whatever is wrong is a miss, a counter moves,
and the entry is dropped with all that need it.

**Room.** The index knows the bytes of all files, and what is being written. A transaction makes room before a file is
written, so that the budget holds for several processes together. What goes first: pages that nothing needs; then the
state with the lowest score. A score is value plus inflation (GreedyDual-Size, Cao and Irani 1997): value is FLOPs saved
per byte and by what the policy expects of the prefix, inflation the score of what went last. The order needs no clock.
"""
