/*
 * PID 1 of a user's own program: finetune-init [--message-file FILE] -- COMMAND [ARGUMENT...]
 *
 * A program that ends with 0 because it was asked to stop looks to Kubernetes as if it had finished. So this waits for
 * it, and says in exit code and termination message how it ended: the table is finetune_crds/verdict.py.
 *
 *   asked to stop (SIGTERM, SIGINT, SIGQUIT), then ended somehow    75 STOPPED
 *   0                                                               0 FINISHED
 *   could not be started                                            64 USER_ERROR
 *   N, or killed by signal N                                        N or 128+N, the message says 68 PROGRAM_FAILED
 *
 * A code of the table (64 to 77) that a program returns by chance would be misread: it becomes 68. A program that knows
 * the table writes its own verdict, {"code": ...}, to the file; then its code stays (but 0 after a stop signal never
 * does). Other last words in the file are replaced: they say nothing of the table, and 64 to 78 are sysexits.h's too.
 *
 * finetune-init --copy-to DIRECTORY copies itself there: an init container brings it into a volume of the pod.
 * Linked statically, as nothing is known of the image that it runs in.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { FINISHED = 0, USER_ERROR = 64, PROGRAM_FAILED = 68, STOPPED = 75, LAST_OF_TABLE = 77 };

static const char *message_file = "/dev/termination-log";

static void fail(const char *what, const char *which) {
    fprintf(stderr, "finetune-init: %s %s: %s\n", what, which, strerror(errno));
    exit(USER_ERROR);
}

/* Whether the program has written a verdict of its own. */
static int has_verdict(void) {
    char text[4096 + 1];
    FILE *file = fopen(message_file, "r");
    if (file == NULL)
        return 0;
    text[fread(text, 1, sizeof text - 1, file)] = '\0';
    fclose(file);
    return text[0] == '{' && strstr(text, "\"code\"") != NULL;
}

/* Writes {"code": CODE, "message": MESSAGE}; MESSAGE must need no escape but those of a command's name, done here. */
static void write_message(int code, const char *before, const char *name, const char *after) {
    FILE *file = fopen(message_file, "w");
    if (file == NULL) {
        fprintf(stderr, "finetune-init: cannot write %s: %s\n", message_file, strerror(errno));
        return;
    }
    fprintf(file, "{\"code\":%d,\"message\":\"%s", code, before);
    for (int length = 0; name[length] != '\0' && length < 256; length++) {
        unsigned char character = (unsigned char)name[length];
        int plain = character >= 0x20 && character < 0x7f && character != '"' && character != '\\';
        fputc(plain ? character : '?', file);
    }
    fprintf(file, "%s\"}", after);
    fclose(file);
}

static int copy_to(const char *directory) {
    char target[PATH_MAX], buffer[1 << 16];
    snprintf(target, sizeof target, "%s/finetune-init", directory);
    int source = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    if (source < 0)
        fail("cannot read", "/proc/self/exe");
    int copy = open(target, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0755);
    if (copy < 0)
        fail("cannot write", target);
    for (ssize_t size; (size = read(source, buffer, sizeof buffer)) != 0;)
        if (size < 0 || write(copy, buffer, (size_t)size) != size)
            fail("cannot write", target);
    if (fchmod(copy, 0755) != 0 || close(copy) != 0)
        fail("cannot write", target);
    return 0;
}

/* Starts the command; what exec says if it cannot comes back through a pipe that a successful exec closes. */
static pid_t start(char **command, const sigset_t *mask) {
    int report[2], error = 0;
    if (pipe2(report, O_CLOEXEC) != 0)
        fail("cannot start", command[0]);
    pid_t child = fork();
    if (child == 0) {
        sigprocmask(SIG_SETMASK, mask, NULL);
        execvp(command[0], command);
        error = errno;
        (void)!write(report[1], &error, sizeof error);
        _exit(127);
    }
    if (child < 0)
        fail("cannot start", command[0]);
    close(report[1]);
    ssize_t size = read(report[0], &error, sizeof error);
    close(report[0]);
    if (size == sizeof error) {
        char reason[128];
        snprintf(reason, sizeof reason, "': %s", strerror(error));
        write_message(USER_ERROR, "spec.runtime.command: cannot run '", command[0], reason);
        errno = error;
        fail("cannot run", command[0]);
    }
    return child;
}

/* Forwards every signal to the child and reaps whatever ends, until the child does; its wait status. */
static int supervise(pid_t child, const sigset_t *all, int *asked_to_stop) {
    for (;;) {
        siginfo_t received;
        if (sigwaitinfo(all, &received) < 0)
            continue;
        int signal_number = received.si_signo;
        if (signal_number != SIGCHLD) {
            *asked_to_stop |= signal_number == SIGTERM || signal_number == SIGINT || signal_number == SIGQUIT;
            kill(child, signal_number);
            continue;
        }
        int status;
        for (pid_t ended; (ended = waitpid(-1, &status, WNOHANG)) > 0;)
            if (ended == child)
                return status;
    }
}

static int verdict(int status, int asked_to_stop) {
    int own = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    int own_verdict = has_verdict();
    char how[128];
    if (WIFSIGNALED(status))
        snprintf(how, sizeof how, "was killed by signal %d (%s)", WTERMSIG(status), strsignal(WTERMSIG(status)));
    else
        snprintf(how, sizeof how, "ended with exit code %d", own);
    if (own_verdict && !(asked_to_stop && own == FINISHED))
        return own;
    if (asked_to_stop) {
        write_message(STOPPED, "Asked to stop; the program ", how, ".");
        return STOPPED;
    }
    if (own == FINISHED) {
        write_message(FINISHED, "", "", "");
        return FINISHED;
    }
    write_message(PROGRAM_FAILED, "The program ", how, ".");
    return own >= USER_ERROR && own <= LAST_OF_TABLE ? PROGRAM_FAILED : own;
}

int main(int count, char **arguments) {
    int next = 1;
    if (count == 3 && strcmp(arguments[1], "--copy-to") == 0)
        return copy_to(arguments[2]);
    if (count > next + 1 && strcmp(arguments[next], "--message-file") == 0) {
        message_file = arguments[next + 1];
        next += 2;
    }
    if (count < next + 2 || strcmp(arguments[next], "--") != 0) {
        fputs("usage: finetune-init [--message-file FILE] -- COMMAND [ARGUMENT...]\n"
              "       finetune-init --copy-to DIRECTORY\n",
              stderr);
        return USER_ERROR;
    }
    sigset_t all, before;
    sigfillset(&all);
    /* A fault of this program itself must end it, and these are the signals of one. */
    for (const int *fault = (const int[]){SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGTRAP, SIGSYS, 0}; *fault; fault++)
        sigdelset(&all, *fault);
    sigprocmask(SIG_BLOCK, &all, &before);
    int asked_to_stop = 0;
    pid_t child = start(arguments + next + 1, &before);
    int status = supervise(child, &all, &asked_to_stop);
    return verdict(status, asked_to_stop);
}
