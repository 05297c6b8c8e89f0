/* The loop of the I/O threads: read, write or compare the pieces of a schedule, hash every block.

   Knows descriptors, memory and counters; no Python and no plan, and of a GPU only the functions of
   its driver that are given to `packcast_pool_copy`. The schedule is fixed before the first thread
   starts. A grain, some blocks of a piece, is what a thread does at a time; the
   threads take the grains in order. Three things pass between the threads and the caller: how many
   units the threads may work on (`allowed`), how many grains of each unit are left, and one cell
   for the first failure.

   Memory order. `allowed` is stored with release and loaded with acquire, so that a thread that
   sees a unit allowed also sees the bytes, digests and descriptors that the caller put there.
   `left[u]` is decremented with release and loaded with acquire, so that whoever sees 0 also sees
   what every thread wrote for the unit (the decrements form one release sequence). The
   totals are statistics and relaxed. `stop` is only a wish and relaxed; what it means is under the
   mutex. Sleeping and waking is done under the mutex, so that no wake-up is lost. */

#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { POOL_ABI = 3 };
enum { BLOCK = 1 << 20, DIGEST = 16, STACK_NBYTES = 256 << 10 };
enum task { TASK_READ = 0, TASK_WRITE = 1, TASK_COMPARE = 2 };
enum flag { FLAG_TOLERANT = 1, FLAG_WRITEBACK = 2, FLAG_UNHASHED = 4 };
enum kind { KIND_NONE = 0, KIND_ERRNO = 1, KIND_END_OF_FILE = 2, KIND_DAMAGED = 3 };
enum { IN_MEMORY = -1 }; /* a span's file: its offset is an address in this process */

typedef struct { uint64_t low, high; } hash128; /* as XXH128_hash_t */
typedef hash128 (*hash_function)(const void *, size_t);

/* The span of piece i are spans[pieces[i].span] to spans[pieces[i + 1].span]. */
struct piece { int64_t unit, memory, nbytes, block, span; };
struct span { int64_t file, offset, at, nbytes; };

struct config {
    int64_t task, flags, num_threads, num_units, num_pieces;
    const struct piece *pieces; /* num_pieces and one more, which ends the last one's spans */
    const struct span *spans;
    uint8_t *memory;
    const int32_t *descriptors; /* by file; each is set before the unit that needs it is allowed */
    uint8_t *digests;           /* by block: found by TASK_READ, promised to the others */
    int64_t *differences;       /* by span: the first byte that differs, or -1; TASK_COMPARE */
    hash_function hash;
    int64_t grain_nbytes; /* a multiple of BLOCK */
};

/* Copies of units to a device, in order, by one thread at a time. Functions and handles are of
   CUDA's driver: cuMemcpyHtoDAsync, cuEventRecord, cuEventQuery. */
struct copies {
    int32_t (*copy)(uint64_t into, const void *from, size_t nbytes, void *stream);
    int32_t (*record)(void *event, void *stream);
    int32_t (*query)(void *event);
    void *stream;
    void **events;                  /* by place: after the last copy out of it */
    const struct unit_copy *copies; /* by unit */
    int64_t num_places;             /* unit u lies in the place of unit u - num_places */
    int64_t num_ready;              /* units whose files are open */
    int64_t num_begun, num_over;
    void *begin;  /* an event to record before the next copy, or NULL */
    int64_t code; /* what the driver said, where it failed */
};
struct unit_copy { int64_t memory, nbytes, slot_offset; };
enum { CUDA_NOT_READY = 600 };
enum { LOOK_SOON_NS = 100 * 1000, LOOK_NS = 500 * 1000, LOOK_LATE_NS = 1000 * 1000 };

struct pool;

struct thread {
    struct pool *pool;
    pthread_t id;
    pthread_cond_t wake;
    int64_t waits_for; /* the unit, or -1; under the mutex */
    uint8_t *scratch;  /* a block, for TASK_COMPARE */
};

struct failure { int64_t kind, code, piece, span, offset; };

struct pool {
    struct config config;
    _Atomic int64_t next_grain, allowed;
    _Atomic int stop;
    _Atomic int32_t *left;
    int64_t *first_grain; /* by piece, and how many there are in all */
    _Atomic int64_t nbytes, busy_ns, first_ns, last_ns;
    pthread_mutex_t mutex;
    pthread_cond_t changed; /* a unit is done, a thread has failed or ended, or stop */
    int64_t num_alive, num_started, num_copying;
    struct failure failure;
    struct thread *threads;
};

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static struct timespec deadline_of(int64_t timeout_ns)
{
    int64_t at = now_ns() + timeout_ns;
    struct timespec deadline = {at / 1000000000, at % 1000000000};
    return deadline;
}

static void wake_all(struct pool *pool) /* under the mutex */
{
    for (int64_t i = 0; i < pool->config.num_threads; i++)
        pthread_cond_signal(&pool->threads[i].wake);
    pthread_cond_broadcast(&pool->changed);
}

static void fail(struct pool *pool, struct failure failure)
{
    pthread_mutex_lock(&pool->mutex);
    if (pool->failure.kind == KIND_NONE)
        pool->failure = failure;
    atomic_store_explicit(&pool->stop, 1, memory_order_relaxed);
    wake_all(pool);
    pthread_mutex_unlock(&pool->mutex);
}

/* The canonical form of XXH3's 128 bits: big endian, the high half first. */
static void put_digest(uint8_t *into, hash128 hash)
{
    for (int i = 0; i < 8; i++) {
        into[i] = (uint8_t)(hash.high >> (56 - 8 * i));
        into[8 + i] = (uint8_t)(hash.low >> (56 - 8 * i));
    }
}

/* 0, or the kind of failure, with errno in `code`; `offset` is where it stopped. */
static int read_exactly(int fd, uint8_t *into, int64_t nbytes, int64_t *offset, int64_t *code)
{
    while (nbytes > 0) {
        ssize_t got = pread(fd, into, (size_t)nbytes, *offset);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            *code = got < 0 ? errno : 0;
            return got < 0 ? KIND_ERRNO : KIND_END_OF_FILE;
        }
        into += got, *offset += got, nbytes -= got;
    }
    return KIND_NONE;
}

static int write_exactly(int fd, const uint8_t *from, int64_t nbytes, int64_t *offset, int64_t *code)
{
    while (nbytes > 0) {
        ssize_t put = pwrite(fd, from, (size_t)nbytes, *offset);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0) {
            *code = put < 0 ? errno : EIO;
            return KIND_ERRNO;
        }
        from += put, *offset += put, nbytes -= put;
    }
    return KIND_NONE;
}

static int64_t first_difference(const uint8_t *one, const uint8_t *other, int64_t nbytes)
{
    int64_t begin = 0, step = 4096;
    if (memcmp(one, other, (size_t)nbytes) == 0)
        return -1;
    while (nbytes - begin > step && memcmp(one + begin, other + begin, (size_t)step) == 0)
        begin += step;
    while (one[begin] == other[begin])
        begin++;
    return begin;
}

/* What the task does with `nbytes` of the memory at `data`, which lie at `offset` of the span. */
static int do_part(struct thread *me, int64_t span, uint8_t *data, int64_t nbytes, int64_t *offset,
                   int64_t *code)
{
    const struct config *config = &me->pool->config;
    int64_t file = config->spans[span].file;
    if (file == IN_MEMORY) {
        void *there = (void *)(intptr_t)*offset;
        if (config->task == TASK_READ)
            memcpy(data, there, (size_t)nbytes);
        else
            memcpy(there, data, (size_t)nbytes);
        return KIND_NONE;
    }
    int fd = config->descriptors[file];
    if (config->task == TASK_READ)
        return read_exactly(fd, data, nbytes, offset, code);
    if (config->task == TASK_WRITE)
        return write_exactly(fd, data, nbytes, offset, code);
    int64_t begin = *offset;
    int kind = read_exactly(fd, me->scratch, nbytes, offset, code);
    int64_t *known = &config->differences[span];
    if (kind == KIND_NONE && *known < 0) {
        int64_t at = first_difference(data, me->scratch, nbytes);
        if (at >= 0)
            *known = begin + at;
    }
    return kind;
}

/* The parts of the piece's spans that lie in its bytes `begin` to `end`; `*span` is the first span
   that may, and is moved on. */
static int do_parts(struct thread *me, int64_t index, int64_t begin, int64_t end, int64_t *span)
{
    struct pool *pool = me->pool;
    const struct piece *piece = &pool->config.pieces[index];
    for (; *span < piece[1].span; (*span)++) {
        const struct span *it = &pool->config.spans[*span];
        int64_t low = it->at > begin ? it->at : begin;
        int64_t high = it->at + it->nbytes < end ? it->at + it->nbytes : end;
        if (low < high) {
            int64_t offset = it->offset + low - it->at, code = 0;
            uint8_t *data = pool->config.memory + piece->memory + low;
            int kind = do_part(me, *span, data, high - low, &offset, &code);
            if (kind != KIND_NONE) {
                struct failure failure = {kind, code, index, *span, offset};
                fail(pool, failure);
                return 0;
            }
        }
        if (it->at + it->nbytes > end)
            break;
    }
    return 1;
}

/* The piece's bytes `from` to `to`, block by block, so that each is hashed while it is in the
   cache. Whether all of it was done. */
static int do_grain(struct thread *me, int64_t index, int64_t from, int64_t to)
{
    struct pool *pool = me->pool;
    const struct config *config = &pool->config;
    const struct piece *piece = &config->pieces[index];
    uint8_t *digest = config->digests + (piece->block + from / BLOCK) * DIGEST;
    int64_t span = piece->span;
    for (int64_t begin = from; begin < to; begin += BLOCK, digest += DIGEST) {
        if (atomic_load_explicit(&pool->stop, memory_order_relaxed))
            return 0;
        int64_t end = begin + BLOCK < to ? begin + BLOCK : to;
        uint8_t *data = config->memory + piece->memory + begin;
        if (config->task == TASK_READ && !do_parts(me, index, begin, end, &span))
            return 0;
        if (config->flags & FLAG_UNHASHED) {
            if (config->task != TASK_READ && !do_parts(me, index, begin, end, &span))
                return 0;
            continue;
        }
        uint8_t found[DIGEST];
        put_digest(found, config->hash(data, (size_t)(end - begin)));
        if (config->task == TASK_READ) {
            memcpy(digest, found, DIGEST);
            continue;
        }
        if (memcmp(digest, found, DIGEST) != 0) {
            if (!(config->flags & FLAG_TOLERANT)) {
                struct failure failure = {KIND_DAMAGED, 0, index, -1, begin};
                fail(pool, failure);
                return 0;
            }
            memset(digest, 0, DIGEST); /* not proven */
        }
        if (!do_parts(me, index, begin, end, &span))
            return 0;
    }
#ifdef SYNC_FILE_RANGE_WRITE
    /* The disk works meanwhile, and fsync, which tells of its errors, has less to wait for. */
    if (config->task == TASK_WRITE && config->flags & FLAG_WRITEBACK)
        for (span = piece->span; span < piece[1].span; span++) {
            const struct span *it = &config->spans[span];
            int64_t low = it->at > from ? it->at : from;
            int64_t high = it->at + it->nbytes < to ? it->at + it->nbytes : to;
            if (it->file != IN_MEMORY && low < high)
                (void)sync_file_range(config->descriptors[it->file], it->offset + low - it->at,
                                      high - low, SYNC_FILE_RANGE_WRITE);
        }
#endif
    return 1;
}

static void jitter(int64_t index)
{
#ifdef PACKCAST_JITTER_NS /* for tests that look for races */
    uint64_t mixed = ((uint64_t)index + (uint64_t)now_ns()) * 0x9E3779B97F4A7C15u;
    struct timespec pause = {0, (long)((mixed >> 32) % PACKCAST_JITTER_NS)};
    nanosleep(&pause, NULL);
#else
    (void)index;
#endif
}

/* Block until the unit is allowed; false: the pool has been stopped. */
static int await_allowed(struct thread *me, int64_t unit)
{
    struct pool *pool = me->pool;
    if (atomic_load_explicit(&pool->allowed, memory_order_acquire) > unit)
        return !atomic_load_explicit(&pool->stop, memory_order_relaxed);
    pthread_mutex_lock(&pool->mutex);
    me->waits_for = unit;
    while (atomic_load_explicit(&pool->allowed, memory_order_acquire) <= unit &&
           !atomic_load_explicit(&pool->stop, memory_order_relaxed))
        pthread_cond_wait(&me->wake, &pool->mutex);
    me->waits_for = -1;
    pthread_mutex_unlock(&pool->mutex);
    return !atomic_load_explicit(&pool->stop, memory_order_relaxed);
}

static void count(struct pool *pool, int64_t nbytes, int64_t began)
{
    int64_t ended = now_ns(), known;
    atomic_fetch_add_explicit(&pool->busy_ns, ended - began, memory_order_relaxed);
    known = atomic_load_explicit(&pool->first_ns, memory_order_relaxed);
    while (began < known && !atomic_compare_exchange_weak_explicit(
                                &pool->first_ns, &known, began, memory_order_relaxed,
                                memory_order_relaxed))
        ;
    known = atomic_load_explicit(&pool->last_ns, memory_order_relaxed);
    while (ended > known && !atomic_compare_exchange_weak_explicit(
                                &pool->last_ns, &known, ended, memory_order_relaxed,
                                memory_order_relaxed))
        ;
    atomic_fetch_add_explicit(&pool->nbytes, nbytes, memory_order_relaxed);
}

static void *work(void *argument)
{
    struct thread *me = argument;
    struct pool *pool = me->pool;
    int64_t index = 0, grain_nbytes = pool->config.grain_nbytes;
    for (;;) {
        int64_t grain = atomic_fetch_add_explicit(&pool->next_grain, 1, memory_order_relaxed);
        if (grain >= pool->first_grain[pool->config.num_pieces])
            break;
        while (pool->first_grain[index + 1] <= grain)
            index++;
        const struct piece *piece = &pool->config.pieces[index];
        int64_t from = (grain - pool->first_grain[index]) * grain_nbytes;
        int64_t to = from + grain_nbytes < piece->nbytes ? from + grain_nbytes : piece->nbytes;
        if (!await_allowed(me, piece->unit))
            break;
        jitter(grain);
        int64_t began = now_ns();
        if (!do_grain(me, index, from, to))
            break;
        count(pool, to - from, began);
        if (atomic_fetch_sub_explicit(&pool->left[piece->unit], 1, memory_order_release) == 1) {
            pthread_mutex_lock(&pool->mutex);
            pthread_cond_broadcast(&pool->changed);
            pthread_mutex_unlock(&pool->mutex);
        }
    }
    pthread_mutex_lock(&pool->mutex);
    pool->num_alive--;
    pthread_cond_broadcast(&pool->changed);
    pthread_mutex_unlock(&pool->mutex);
    return NULL;
}

int64_t packcast_pool_abi(void)
{
    return POOL_ABI;
}

/* Units below `units` may be worked on; never fewer than before. */
void packcast_pool_allow(struct pool *pool, int64_t units)
{
    pthread_mutex_lock(&pool->mutex);
    atomic_store_explicit(&pool->allowed, units, memory_order_release);
    for (int64_t i = 0; i < pool->config.num_threads; i++) {
        int64_t unit = pool->threads[i].waits_for;
        if (unit >= 0 && unit < units)
            pthread_cond_signal(&pool->threads[i].wake);
    }
    pthread_mutex_unlock(&pool->mutex);
}

/* 1: the unit is done. 0: not within `timeout_ns`. -1: failed or stopped before it was done. */
int packcast_pool_wait(struct pool *pool, int64_t unit, int64_t timeout_ns)
{
    _Atomic int32_t *left = &pool->left[unit];
    if (atomic_load_explicit(left, memory_order_acquire) == 0)
        return 1;
    struct timespec deadline = deadline_of(timeout_ns);
    int result = 0, timed_out = timeout_ns <= 0;
    pthread_mutex_lock(&pool->mutex);
    for (;;) {
        if (atomic_load_explicit(left, memory_order_acquire) == 0)
            result = 1;
        else if (atomic_load_explicit(&pool->stop, memory_order_relaxed))
            result = -1;
        if (result != 0 || timed_out)
            break;
        timed_out = pthread_cond_timedwait(&pool->changed, &pool->mutex, &deadline) == ETIMEDOUT;
    }
    pthread_mutex_unlock(&pool->mutex);
    return result;
}

/* Have every thread end after the block at hand. Any thread, any number of times. */
void packcast_pool_stop(struct pool *pool)
{
    pthread_mutex_lock(&pool->mutex);
    atomic_store_explicit(&pool->stop, 1, memory_order_relaxed);
    wake_all(pool);
    pthread_mutex_unlock(&pool->mutex);
}

static int copy_next(struct pool *pool, struct copies *copies, uint64_t slot)
{
    int64_t unit = copies->num_begun;
    const struct unit_copy *it = &copies->copies[unit];
    pthread_mutex_lock(&pool->mutex);
    int is_stopped = atomic_load_explicit(&pool->stop, memory_order_relaxed);
    pool->num_copying += !is_stopped;
    pthread_mutex_unlock(&pool->mutex);
    if (is_stopped)
        return -1;
    jitter(unit);
    if (copies->begin != NULL)
        copies->code = copies->record(copies->begin, copies->stream);
    copies->begin = NULL;
    if (copies->code == 0)
        copies->code = copies->copy(slot + (uint64_t)it->slot_offset,
                                    pool->config.memory + it->memory, (size_t)it->nbytes,
                                    copies->stream);
    if (copies->code == 0)
        copies->code = copies->record(copies->events[unit % copies->num_places], copies->stream);
    copies->num_begun++;
    pthread_mutex_lock(&pool->mutex);
    pool->num_copying--;
    pthread_cond_broadcast(&pool->changed);
    pthread_mutex_unlock(&pool->mutex);
    return copies->code == 0 ? 1 : -2;
}

/* Allow as many units as have their files open and the place of a unit whose copy is over. */
static int reuse_places(struct pool *pool, struct copies *copies)
{
    while (copies->num_over < copies->num_begun && copies->code == 0) {
        int32_t code = copies->query(copies->events[copies->num_over % copies->num_places]);
        if (code == CUDA_NOT_READY)
            break;
        copies->code = code;
        copies->num_over++;
    }
    int64_t units = copies->num_over + copies->num_places;
    if (units > copies->num_ready)
        units = copies->num_ready;
    if (units > atomic_load_explicit(&pool->allowed, memory_order_relaxed))
        packcast_pool_allow(pool, units);
    return copies->code == 0;
}

/* Begin the copies of all units below `end` into the slot, each as soon as it is done, and wait for
   unit `until`, which is not copied if it is `end`. 1: so it is. 0: not within `timeout_ns`, or not
   with `num_ready` units; call again. -1: failed or stopped. -2: the driver failed. After a stop no
   copy begins, and `packcast_pool_join` waits for one that is about to. */
int packcast_pool_copy(struct pool *pool, struct copies *copies, int64_t end, int64_t until,
                       uint64_t slot, int64_t timeout_ns)
{
    int64_t deadline = now_ns() + timeout_ns, seen = -1, pause = 0;
    while (reuse_places(pool, copies)) {
        int64_t unit = copies->num_begun < end ? copies->num_begun : until;
        int64_t left = unit < copies->num_ready ? deadline - now_ns() : 0;
        /* With half of the places ahead, the threads have work; where nothing moves, look less. */
        int64_t ahead = atomic_load_explicit(&pool->allowed, memory_order_relaxed) - unit;
        int64_t soon = ahead > copies->num_places / 2 ? LOOK_NS : LOOK_SOON_NS;
        pause = seen == copies->num_over ? 2 * pause : soon;
        pause = pause < LOOK_LATE_NS ? pause : LOOK_LATE_NS;
        seen = copies->num_over;
        int result = packcast_pool_wait(pool, unit, pause < left ? pause : left);
        if (result == 1 && copies->num_begun >= end)
            return 1;
        if (result == 1)
            result = copy_next(pool, copies, slot);
        if (result < 0)
            return result;
        if (result == 0 && left <= pause)
            return 0;
    }
    return -2;
}

/* How many threads have not ended within `timeout_ns`, or may be about to begin a copy: then
   nothing may be freed. Any thread, any number of times: joined once, under the mutex, which a
   thread that has counted itself out does not take again. */
int64_t packcast_pool_join(struct pool *pool, int64_t timeout_ns)
{
    struct timespec deadline = deadline_of(timeout_ns);
    pthread_mutex_lock(&pool->mutex);
    while (pool->num_alive + pool->num_copying > 0)
        if (pthread_cond_timedwait(&pool->changed, &pool->mutex, &deadline) == ETIMEDOUT)
            break;
    int64_t num_alive = pool->num_alive + pool->num_copying;
    while (num_alive == 0 && pool->num_started > 0)
        pthread_join(pool->threads[--pool->num_started].id, NULL);
    pthread_mutex_unlock(&pool->mutex);
    return num_alive;
}

/* Only after `packcast_pool_join` has returned 0. */
void packcast_pool_free(struct pool *pool)
{
    for (int64_t i = 0; i < pool->config.num_threads; i++) {
        pthread_cond_destroy(&pool->threads[i].wake);
        free(pool->threads[i].scratch);
    }
    pthread_cond_destroy(&pool->changed);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->threads);
    free((void *)pool->left);
    free(pool->first_grain);
    free(pool);
}

/* Bytes done, and nanoseconds: busy (added up over threads), first begin, last end. */
void packcast_pool_totals(struct pool *pool, int64_t into[4])
{
    into[0] = atomic_load_explicit(&pool->nbytes, memory_order_relaxed);
    into[1] = atomic_load_explicit(&pool->busy_ns, memory_order_relaxed);
    into[2] = atomic_load_explicit(&pool->first_ns, memory_order_relaxed);
    into[3] = atomic_load_explicit(&pool->last_ns, memory_order_relaxed);
}

/* Kind, errno, piece, span, and the offset in the span's file or of the block in the piece. */
void packcast_pool_failure(struct pool *pool, int64_t into[5])
{
    pthread_mutex_lock(&pool->mutex);
    memcpy(into, &pool->failure, sizeof pool->failure);
    pthread_mutex_unlock(&pool->mutex);
}

static int start_threads(struct pool *pool)
{
    sigset_t all, before;
    pthread_attr_t attributes;
    int code = pthread_attr_init(&attributes);
    if (code != 0)
        return code;
    pthread_attr_setstacksize(&attributes, STACK_NBYTES);
    /* Signals are for the interpreter's threads. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_mutex_lock(&pool->mutex); /* a thread that ends at once counts itself out behind us */
    while (pool->num_started < pool->config.num_threads && code == 0) {
        struct thread *thread = &pool->threads[pool->num_started];
        code = pthread_create(&thread->id, &attributes, work, thread);
        if (code == 0)
            pool->num_alive++, pool->num_started++;
    }
    pthread_mutex_unlock(&pool->mutex);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return code;
}

static struct pool *make_pool(const struct config *config)
{
    struct pool *pool = calloc(1, sizeof *pool);
    if (pool == NULL)
        return NULL;
    pool->config = *config;
    pool->threads = calloc((size_t)config->num_threads, sizeof *pool->threads);
    pool->left = calloc((size_t)config->num_units + 1, sizeof *pool->left);
    pool->first_grain = calloc((size_t)config->num_pieces + 1, sizeof *pool->first_grain);
    int has_room = pool->threads != NULL && pool->left != NULL && pool->first_grain != NULL;
    for (int64_t i = 0; has_room && i < config->num_threads; i++) {
        pool->threads[i].pool = pool;
        pool->threads[i].waits_for = -1;
        if (config->task == TASK_COMPARE)
            has_room = (pool->threads[i].scratch = malloc(BLOCK)) != NULL;
    }
    if (has_room) {
        for (int64_t i = 0; i < config->num_pieces; i++) {
            const struct piece *piece = &config->pieces[i];
            int64_t count = (piece->nbytes + config->grain_nbytes - 1) / config->grain_nbytes;
            pool->first_grain[i + 1] = pool->first_grain[i] + count;
            pool->left[piece->unit] += (int32_t)count;
        }
        atomic_store_explicit(&pool->first_ns, INT64_MAX, memory_order_relaxed);
        return pool;
    }
    for (int64_t i = 0; pool->threads != NULL && i < config->num_threads; i++)
        free(pool->threads[i].scratch);
    free(pool->threads);
    free((void *)pool->left);
    free(pool->first_grain);
    free(pool);
    return NULL;
}

/* Start the threads of a schedule that stays where it is until `packcast_pool_free`. 0 or an errno. */
int packcast_pool_start(const struct config *config, struct pool **into)
{
    pthread_condattr_t monotonic;
    struct pool *pool = make_pool(config);
    if (pool == NULL)
        return ENOMEM;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->changed, &monotonic);
    for (int64_t i = 0; i < config->num_threads; i++)
        pthread_cond_init(&pool->threads[i].wake, NULL);
    pthread_condattr_destroy(&monotonic);
    int code = start_threads(pool);
    if (code != 0) {
        packcast_pool_stop(pool);
        packcast_pool_join(pool, INT64_MAX / 4);
        packcast_pool_free(pool);
        return code;
    }
    *into = pool;
    return 0;
}
