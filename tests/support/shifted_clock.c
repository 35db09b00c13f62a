/* Clock that a test shifts: a library for LD_PRELOAD that adds seconds to the real-time clock of a process.
 *
 * The number of seconds is a 64-bit integer in the file with the name of this library and `.seconds` at the end. A test
 * changes the number while processes run, and all processes see the new number at once. The library finds the file by
 * its own path, so child processes need no variable other than LD_PRELOAD.
 *
 * As on a real machine, the monotonic clock does not jump. A wait until a time of the real-time clock ends when the
 * shifted clock reaches this time, even if the clock jumps during the wait. The kernel still writes unshifted times to
 * files, as a file server with a clock of its own does.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define YEAR_2001 1000000000 /* a deadline after this number of seconds belongs to the real-time clock */
#define SLICE 100000000      /* longest wait without a look at the shifted clock, in nanoseconds */

static volatile int64_t *shift;

__attribute__((constructor)) static void map_shift(void) {
    Dl_info library;
    char path[PATH_MAX];
    if (!dladdr((void *) map_shift, &library)) abort();
    snprintf(path, sizeof path, "%s.seconds", library.dli_fname);
    int fd = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
    void *mapped = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *shift, PROT_READ, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) { perror(path); abort(); }
    syscall(SYS_close, fd);
    shift = mapped;
}

static int64_t seconds(void) { return shift ? *shift : 0; }

static int is_real(clockid_t clock) { return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && is_real(clock)) now->tv_sec += seconds();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    (void) zone;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME_COARSE, &now);
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}

int timespec_get(struct timespec *now, int base) { return clock_gettime(CLOCK_REALTIME, now) ? 0 : base; }

/* ---------------------------------------------------------------- waits until a time of the real-time clock */

/* Return whether the shifted clock has reached the deadline. If not, set `slice` to the unshifted end of a short wait. */
static int reached(const struct timespec *deadline, struct timespec *slice) {
    struct timespec now;
    syscall(SYS_clock_gettime, CLOCK_REALTIME, &now);
    int64_t left = (deadline->tv_sec - seconds() - now.tv_sec) * INT64_C(1000000000) + deadline->tv_nsec - now.tv_nsec;
    if (left > SLICE) left = SLICE;
    int64_t end = now.tv_nsec + (left > 0 ? left : 0);
    slice->tv_sec = now.tv_sec + end / 1000000000;
    slice->tv_nsec = end % 1000000000;
    return left <= 0;
}

/* Return the address of a function of libc. Old versions of some functions have another result or another layout. */
static void *original(const char *name) {
    static const char *const versions[] = {"GLIBC_2.34", "GLIBC_2.30", "GLIBC_2.3.2", "GLIBC_2.17"};
    void *found = NULL;
    for (size_t i = 0; !found && i < sizeof versions / sizeof *versions; i++) found = dlvsym(RTLD_NEXT, name, versions[i]);
    if (!found && !(found = dlsym(RTLD_NEXT, name))) abort();
    return found;
}

#define WAIT(is_real_time, wait, timed_out) \
    struct timespec slice; \
    if (!(is_real_time)) { slice = *deadline; return wait; } \
    for (;;) { \
        int late = reached(deadline, &slice), result = wait; \
        if (late || !(timed_out)) return result; \
    }

int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *deadline) {
    static int (*wait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    if (!wait) wait = original("pthread_cond_timedwait");
    WAIT(deadline->tv_sec > YEAR_2001, wait(condition, mutex, &slice), result == ETIMEDOUT)
}

int pthread_cond_clockwait(
    pthread_cond_t *condition, pthread_mutex_t *mutex, clockid_t clock, const struct timespec *deadline) {
    static int (*wait)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
    if (!wait) wait = original("pthread_cond_clockwait");
    WAIT(is_real(clock), wait(condition, mutex, clock, &slice), result == ETIMEDOUT)
}

int pthread_mutex_timedlock(pthread_mutex_t *mutex, const struct timespec *deadline) {
    static int (*wait)(pthread_mutex_t *, const struct timespec *);
    if (!wait) wait = original("pthread_mutex_timedlock");
    WAIT(1, wait(mutex, &slice), result == ETIMEDOUT)
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict deadline) {
    static int (*wait)(sem_t *, const struct timespec *);
    if (!wait) wait = original("sem_timedwait");
    WAIT(1, wait(semaphore, &slice), result && errno == ETIMEDOUT)
}

int sem_clockwait(sem_t *restrict semaphore, clockid_t clock, const struct timespec *restrict deadline) {
    static int (*wait)(sem_t *, clockid_t, const struct timespec *);
    if (!wait) wait = original("sem_clockwait");
    WAIT(is_real(clock), wait(semaphore, clock, &slice), result && errno == ETIMEDOUT)
}
