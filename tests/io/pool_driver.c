/* Pools of all three tasks over temporary files of random bytes, for sanitizers and valgrind.

   Run as `pool_driver FOLDER ROUNDS`; says what is wrong and exits 1, or says how much was right.
   The hash is a simple one of our own: no library is needed, and a sanitizer sees its reads. */

#include "../../packcast/io/_pool.c"

#include <stdio.h>

enum { UNIT = 2 * BLOCK, MAX_UNITS = 4, NUM_FILES = 3, NUM_SPANS = 6, NUM_PIECES = MAX_UNITS };
enum { CAPACITY = MAX_UNITS * UNIT, NUM_DIGESTS = CAPACITY / BLOCK };
enum { SECOND_NS = 1000000000 };

static uint64_t dice_state;

static uint64_t dice(void) /* splitmix64 */
{
    uint64_t z = dice_state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static void expect(int is_so, const char *what, int line)
{
    if (!is_so) {
        fprintf(stderr, "line %d: wrong: %s\n", line, what);
        exit(1);
    }
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)

static hash128 simple_hash(const void *data, size_t nbytes)
{
    const uint8_t *bytes = data;
    uint64_t word;
    hash128 hash = {nbytes, 0x1234567u};
    for (; nbytes >= 8; bytes += 8, nbytes -= 8) {
        memcpy(&word, bytes, 8);
        hash.low = (hash.low ^ word) * 0x100000001B3u;
        hash.high += hash.low >> 7;
    }
    for (; nbytes > 0; bytes++, nbytes--)
        hash.low = (hash.low ^ *bytes) * 0x100000001B3u;
    return hash;
}

/* What a round is about: exact allocations, so that a byte too much is seen. */
struct round {
    struct config config;
    struct piece pieces[NUM_PIECES + 1];
    struct span *spans;
    int32_t descriptors[NUM_FILES];
    uint8_t *expected, *literal;
    int64_t num_spans, nbytes, damaged_at;
    char folder[200];
};

static void name_of(const struct round *round, int file, char *into)
{
    sprintf(into, "%s/file-%d", round->folder, file);
}

/* The unit's piece from a third each: a file, memory, another file. */
static void add_spans(struct round *round, int64_t unit, int64_t nbytes)
{
    int64_t third = nbytes / 3, begin = unit * UNIT;
    struct span *into = round->spans + round->num_spans;
    into[0] = (struct span){unit % NUM_FILES, begin, 0, third};
    into[1] = (struct span){IN_MEMORY, (int64_t)(intptr_t)(round->literal + begin + third), third,
                            third};
    into[2] = (struct span){(unit + 1) % NUM_FILES, begin + 2 * third, 2 * third,
                            nbytes - 2 * third};
    round->num_spans += 3;
}

static void begin_round(struct round *round, enum task task)
{
    int64_t num_units = 1 + (int64_t)(dice() % MAX_UNITS);
    int64_t last = 3 + (int64_t)(dice() % (UNIT - 3));
    round->nbytes = (num_units - 1) * UNIT + last;
    round->spans = calloc((size_t)(3 * num_units), sizeof *round->spans);
    round->expected = malloc((size_t)round->nbytes);
    round->literal = malloc((size_t)round->nbytes);
    round->num_spans = 0;
    for (int64_t i = 0; i < round->nbytes; i++) {
        static uint64_t word;
        word = i % 8 ? word >> 8 : dice();
        round->expected[i] = (uint8_t)word;
    }
    memcpy(round->literal, round->expected, (size_t)round->nbytes);
    for (int64_t u = 0; u < num_units; u++) {
        int64_t nbytes = u + 1 < num_units ? UNIT : last;
        round->pieces[u] = (struct piece){u, u * UNIT, nbytes, u * UNIT / BLOCK, 3 * u};
        add_spans(round, u, nbytes);
    }
    round->pieces[num_units] = (struct piece){0, 0, 0, 0, round->num_spans};
    for (int file = 0; file < NUM_FILES; file++) {
        char name[300];
        name_of(round, file, name);
        round->descriptors[file] = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);
        EXPECT(round->descriptors[file] >= 0);
        if (task != TASK_WRITE)
            EXPECT(pwrite(round->descriptors[file], round->expected, (size_t)round->nbytes, 0) ==
                   round->nbytes);
    }
    round->config = (struct config){
        .task = task,
        .flags = (int64_t)(dice() % 2) * FLAG_WRITEBACK,
        .num_threads = 1 + (int64_t)(dice() % (CAPACITY / BLOCK)),
        .num_units = num_units,
        .num_pieces = num_units,
        .pieces = round->pieces,
        .spans = round->spans,
        .memory = malloc((size_t)round->nbytes),
        .descriptors = round->descriptors,
        .digests = malloc((size_t)((round->nbytes + BLOCK - 1) / BLOCK * DIGEST)),
        .differences = malloc((size_t)round->num_spans * sizeof(int64_t)),
        .hash = simple_hash,
        /* A span's difference is for one thread to find. */
        .grain_nbytes = task == TASK_COMPARE || dice() % 2 ? 4 * BLOCK : BLOCK,
    };
    memset(round->config.memory, 0xA5, (size_t)round->nbytes);
    memset(round->config.differences, 0xFF, (size_t)round->num_spans * sizeof(int64_t));
    if (task == TASK_WRITE)
        memset(round->literal, 0, (size_t)round->nbytes);
    round->damaged_at = -1;
}

static int64_t unit_end(const struct round *round, int64_t unit)
{
    return (unit + 1) * UNIT < round->nbytes ? (unit + 1) * UNIT : round->nbytes;
}

/* What the loop does just before it allows a unit: its bytes and their promised digests. */
static void prepare_unit(struct round *round, int64_t unit)
{
    int64_t begin = unit * UNIT, end = unit_end(round, unit);
    if (round->config.task == TASK_READ)
        return;
    memcpy(round->config.memory + begin, round->expected + begin, (size_t)(end - begin));
    for (int64_t at = begin; at < end; at += BLOCK) {
        int64_t nbytes = end - at < BLOCK ? end - at : BLOCK;
        put_digest(round->config.digests + at / BLOCK * DIGEST,
                   simple_hash(round->expected + at, (size_t)nbytes));
    }
    if (round->damaged_at >= begin && round->damaged_at < end)
        round->config.memory[round->damaged_at] ^= 1;
}

/* What it does as soon as a unit is done: use its bytes, or put others in their place. */
static void use_unit(struct round *round, int64_t unit)
{
    int64_t begin = unit * UNIT, end = unit_end(round, unit);
    if (round->config.task == TASK_READ)
        EXPECT(memcmp(round->config.memory + begin, round->expected + begin,
                      (size_t)(end - begin)) == 0);
    else
        memset(round->config.memory + begin, 0, (size_t)(end - begin));
}

static void end_round(struct round *round)
{
    for (int file = 0; file < NUM_FILES; file++)
        close(round->descriptors[file]);
    free(round->spans);
    free(round->expected);
    free(round->literal);
    free(round->config.memory);
    free(round->config.digests);
    free(round->config.differences);
}

/* Everything is where it belongs, and nothing is where it does not. */
static void check_bytes(struct round *round)
{
    uint8_t *found = malloc((size_t)round->nbytes);
    for (int64_t i = 0; i < round->num_spans; i++) {
        const struct span *span = &round->spans[i];
        int64_t at = i / 3 * UNIT + span->at;
        if (span->file == IN_MEMORY)
            memcpy(found + at, (void *)(intptr_t)span->offset, (size_t)span->nbytes);
        else
            EXPECT(pread(round->descriptors[span->file], found + at, (size_t)span->nbytes,
                         span->offset) == span->nbytes);
    }
    EXPECT(memcmp(found, round->expected, (size_t)round->nbytes) == 0);
    free(found);
    uint8_t digest[DIGEST];
    for (int64_t at = 0; at < round->nbytes; at += BLOCK) {
        int64_t nbytes = round->nbytes - at < BLOCK ? round->nbytes - at : BLOCK;
        put_digest(digest, simple_hash(round->expected + at, (size_t)nbytes));
        EXPECT(memcmp(digest, round->config.digests + at / BLOCK * DIGEST, DIGEST) == 0);
    }
}

struct stopping { struct pool *pool; long after_ns; };

static void *stop_later(void *argument)
{
    struct stopping *it = argument;
    struct timespec pause = {0, it->after_ns};
    nanosleep(&pause, NULL);
    packcast_pool_stop(it->pool);
    return NULL;
}

/* Unit by unit, as the loop does it: -1 where it was not done, else 1. */
static int run(struct round *round, int is_stopped)
{
    struct pool *pool = NULL;
    pthread_t stopper;
    struct stopping stopping;
    int result = 1;
    int64_t allowed = 0, totals[4];
    EXPECT(packcast_pool_start(&round->config, &pool) == 0);
    if (is_stopped) {
        stopping = (struct stopping){pool, (long)(dice() % 400000)};
        EXPECT(pthread_create(&stopper, NULL, stop_later, &stopping) == 0);
    }
    for (int64_t unit = 0; unit < round->config.num_units && result == 1; unit++) {
        /* One by one, or several at once, for which every thread may be asleep by now. */
        while (allowed < round->config.num_units && (allowed <= unit || dice() % 2)) {
            prepare_unit(round, allowed++);
            if (dice() % 2)
                packcast_pool_allow(pool, allowed);
        }
        packcast_pool_allow(pool, allowed);
        /* Without the mutex, or with it. */
        for (int polls = dice() % 2 ? INT32_MAX : 0, n = 0; n < polls; n++)
            if ((result = packcast_pool_wait(pool, unit, 0)) != 0)
                break;
        result = packcast_pool_wait(pool, unit, 60 * (int64_t)SECOND_NS);
        if (result == 1)
            use_unit(round, unit);
        EXPECT(result != 0);
        packcast_pool_totals(pool, totals);
    }
    if (is_stopped)
        pthread_join(stopper, NULL);
    packcast_pool_stop(pool);
    EXPECT(packcast_pool_join(pool, 60 * (int64_t)SECOND_NS) == 0);
    EXPECT(packcast_pool_join(pool, 0) == 0);
    if (result < 0) {
        int64_t failure[5];
        packcast_pool_failure(pool, failure);
        result = -(int)failure[0] - 1; /* -1: it was stopped */
    } else
        EXPECT((packcast_pool_totals(pool, totals), totals[0] == round->nbytes));
    packcast_pool_free(pool);
    return result;
}

/* A device whose copies happen late: some of them whenever somebody asks how far they are. */
enum { MAX_QUEUED = 3 * MAX_UNITS + 1 };
static struct {
    struct queued { void *into; const void *from; size_t nbytes; int64_t *event; } queue[MAX_QUEUED];
    int num_queued, num_passed, fails_at;
    _Atomic int closed; /* the pool says that no copy can begin */
} device;

static void queue_up(struct queued it)
{
    EXPECT(!device.closed && device.num_queued < MAX_QUEUED);
    device.queue[device.num_queued++] = it;
}

static int32_t copy_later(uint64_t into, const void *from, size_t nbytes, void *stream)
{
    EXPECT(stream == &device);
    if (device.fails_at-- == 0)
        return 700;
    queue_up((struct queued){(void *)(intptr_t)into, from, nbytes, NULL});
    return 0;
}

static int32_t record_later(void *event, void *stream)
{
    EXPECT(stream == &device);
    *(int64_t *)event = 0;
    queue_up((struct queued){NULL, NULL, 0, event});
    return 0;
}

static void pass_some(int count)
{
    for (; count > 0 && device.num_passed < device.num_queued; count--) {
        struct queued *it = &device.queue[device.num_passed++];
        if (it->event != NULL)
            *it->event = 1;
        else
            memcpy(it->into, it->from, it->nbytes);
    }
}

static int32_t query_late(void *event)
{
    pass_some((int)(dice() % 3));
    return *(int64_t *)event ? 0 : CUDA_NOT_READY;
}

static void *close_later(void *argument)
{
    struct stopping *it = argument;
    stop_later(it);
    while (packcast_pool_join(it->pool, 1000) != 0)
        ;
    device.closed = 1;
    return NULL;
}

/* Read into fewer places than units, and copied out of them: 1, or why not. */
static int run_copies(struct round *round, int is_stopped)
{
    struct pool *pool = NULL;
    pthread_t stopper;
    struct stopping stopping;
    struct unit_copy copies_of[MAX_UNITS];
    int64_t begun = -1, events[MAX_UNITS], num_units = round->config.num_units;
    void *handles[MAX_UNITS];
    int64_t num_places = 1 + (int64_t)(dice() % (uint64_t)num_units);
    for (int64_t u = 0; u < num_units; u++) {
        round->pieces[u].memory = u % num_places * UNIT;
        copies_of[u] = (struct unit_copy){u % num_places * UNIT, round->pieces[u].nbytes, u * UNIT};
        handles[u] = &events[u];
    }
    uint8_t *slot = calloc(1, (size_t)round->nbytes);
    struct copies copies = {copy_later, record_later, query_late, &device, handles, copies_of,
                            num_places, 0,            0,          0,       &begun,  0};
    device.num_queued = device.num_passed = device.closed = 0;
    EXPECT(packcast_pool_start(&round->config, &pool) == 0);
    if (is_stopped) {
        stopping = (struct stopping){pool, (long)(dice() % 400000)};
        EXPECT(pthread_create(&stopper, NULL, close_later, &stopping) == 0);
    }
    int result = 1;
    uint64_t address = (uint64_t)(intptr_t)slot;
    for (int64_t end = 0; end < num_units && result == 1;) {
        end += 1 + (int64_t)(dice() % (uint64_t)(num_units - end));
        int64_t until = dice() % 2 && end < num_units ? end : end - 1;
        while ((result = packcast_pool_copy(pool, &copies, end, until, address,
                                            (int64_t)(dice() % 300000))) == 0)
            copies.num_ready += copies.num_ready <= until;
    }
    if (is_stopped)
        pthread_join(stopper, NULL);
    packcast_pool_stop(pool);
    EXPECT(packcast_pool_join(pool, 60 * (int64_t)SECOND_NS) == 0);
    pass_some(MAX_QUEUED);
    if (result == 1) {
        EXPECT(copies.num_begun == num_units && begun == 1 && copies.begin == NULL);
        EXPECT(memcmp(slot, round->expected, (size_t)round->nbytes) == 0);
    }
    packcast_pool_free(pool);
    free(slot);
    return result;
}

static void copying_rounds(struct round *round)
{
    device.fails_at = -1;
    begin_round(round, TASK_READ);
    EXPECT(run_copies(round, 0) == 1);
    end_round(round);

    begin_round(round, TASK_READ); /* a pool that is closed meanwhile */
    int result = run_copies(round, 1);
    EXPECT(result == 1 || result == -1);
    end_round(round);

    begin_round(round, TASK_READ); /* a device that fails */
    device.fails_at = (int)(dice() % (uint64_t)round->config.num_units);
    EXPECT(run_copies(round, 0) == -2);
    end_round(round);

    begin_round(round, TASK_READ); /* a file that ends early */
    device.fails_at = -1;
    EXPECT(ftruncate(round->descriptors[0], 1) == 0);
    EXPECT(run_copies(round, 0) == -1);
    end_round(round);
}

static void right_round(struct round *round, enum task task)
{
    begin_round(round, task);
    EXPECT(run(round, 0) == 1);
    check_bytes(round);
    for (int64_t i = 0; i < round->num_spans; i++)
        EXPECT(round->config.differences[i] == -1);
    end_round(round);
}

static void stopped_round(struct round *round, enum task task)
{
    begin_round(round, task);
    int result = run(round, 1);
    EXPECT(result == 1 || result == -1);
    if (result == 1)
        check_bytes(round);
    end_round(round);
}

static void failing_rounds(struct round *round)
{
    begin_round(round, TASK_READ); /* a file that ends early */
    EXPECT(ftruncate(round->descriptors[0], 1) == 0);
    EXPECT(run(round, 0) == -KIND_END_OF_FILE - 1);
    end_round(round);

    begin_round(round, TASK_WRITE); /* a descriptor that is closed */
    close(round->descriptors[0]);
    round->descriptors[0] = -1;
    EXPECT(run(round, 0) == -KIND_ERRNO - 1);
    end_round(round);

    begin_round(round, TASK_COMPARE); /* a block that is damaged */
    round->damaged_at = (int64_t)(dice() % (uint64_t)round->nbytes);
    EXPECT(run(round, 0) == -KIND_DAMAGED - 1);
    end_round(round);

    begin_round(round, TASK_COMPARE); /* a local byte that differs */
    const struct span *span = &round->spans[0];
    int64_t at = span->offset + span->nbytes - 1;
    uint8_t other = (uint8_t)(round->expected[span->at + span->nbytes - 1] ^ 1);
    EXPECT(pwrite(round->descriptors[span->file], &other, 1, at) == 1);
    EXPECT(run(round, 0) == 1);
    EXPECT(round->config.differences[0] == at);
    end_round(round);
}

int main(int argc, char **argv)
{
    static struct round round;
    long num_rounds = argc == 3 ? strtol(argv[2], NULL, 10) : 0;
    EXPECT(num_rounds > 0 && strlen(argv[1]) < sizeof round.folder);
    strcpy(round.folder, argv[1]);
    for (long i = 0; i < num_rounds; i++) {
        dice_state = (uint64_t)i;
        for (int task = TASK_READ; task <= TASK_COMPARE; task++) {
            right_round(&round, task);
            stopped_round(&round, task);
        }
        failing_rounds(&round);
        copying_rounds(&round);
    }
    EXPECT(packcast_pool_abi() == POOL_ABI);
    printf("%ld rounds were right\n", num_rounds);
    return 0;
}
