/* Gives a stdio MCP server a port: each connection to 127.0.0.1:PORT gets a process of its own with its first byte, and
 * is that process's standard input and output. Standard error stays the container's.
 *
 * Binds loopback and nothing else. A process whose connection is closed gets the end of its input, SIGTERM after GRACE_MS,
 * SIGKILL after as long again, with all of its process group; a connection whose process has ended is closed. Runs as the
 * container's first process, so it collects orphans, and ends all of them on SIGTERM before itself.
 * Static, because the server's image need not hold a C library: sidegate-relay PORT MAX COMMAND [ARGUMENT...]
 * MCP, transports: stdio, shutdown.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { GRACE_MS = 2000, DRAIN_MS = 1000, BACKLOG = 64, MOST = 1024, BUFFER_BYTES = 64 * 1024 };

struct flow { /* one direction; reads only when all that it read before is written */
    int from, to;
    size_t start, end;
    char data[BUFFER_BYTES];
};

static volatile sig_atomic_t told_to_end;
static sigset_t waiting; /* the signals that are let in while polling, and only then */

static void on_end(int number) { (void)number; told_to_end = 1; }
static void on_child(int number) { (void)number; }

static void die(const char *what) {
    dprintf(2, "sidegate-relay: error: %s: %s\n", what, strerror(errno));
    exit(1);
}

static long now_ms(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000L + time.tv_nsec / 1000000L;
}

static int wait_for(struct pollfd *polled, nfds_t count, long deadline_ms) {
    long left_ms = deadline_ms ? deadline_ms - now_ms() : 0;
    if (left_ms < 0) left_ms = 0;
    struct timespec timeout = {left_ms / 1000, left_ms % 1000 * 1000000L};
    return ppoll(polled, count, deadline_ms ? &timeout : NULL, &waiting);
}

static void shut(int *descriptor) {
    if (*descriptor >= 0) close(*descriptor);
    *descriptor = -1;
}

/* Moves what can be moved; 0 when `from` has ended, -1 when `to` takes no more. */
static int move(struct flow *flow, int is_readable) {
    if (flow->start == flow->end && is_readable) {
        ssize_t got = read(flow->from, flow->data, sizeof flow->data);
        if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) return 0;
        flow->start = 0;
        flow->end = got > 0 ? (size_t)got : 0;
    }
    if (flow->start < flow->end) {
        ssize_t put = write(flow->to, flow->data + flow->start, flow->end - flow->start);
        if (put > 0) flow->start += (size_t)put;
        else if (put < 0 && errno != EAGAIN && errno != EINTR) return -1;
    }
    return 1;
}

static pid_t start(char **command, int input, int output) {
    pid_t child = fork();
    if (child != 0) return child;
    setsid();
    for (int number = 1; number < NSIG; number++) signal(number, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    dup2(input, 0);
    dup2(output, 1);
    execvp(command[0], command);
    dprintf(2, "sidegate-relay: error: cannot run %s: %s\n", command[0], strerror(errno));
    _exit(127);
}

/* Waits for the first byte: who only looks whether the port is open starts no server. */
static int is_meant(int connection) {
    char byte;
    struct pollfd polled = {connection, POLLIN, 0};
    while (!told_to_end)
        if (wait_for(&polled, 1, 0) > 0) return recv(connection, &byte, 1, MSG_PEEK) == 1;
    return 0;
}

/* Serves one connection, in a process of its own; returns when nothing of the server is left. */
static void serve(int connection, char **command) {
    static struct flow in, out;
    int input[2], output[2], one = 1;
    if (!is_meant(connection)) return;
    if (pipe2(input, O_CLOEXEC) || pipe2(output, O_CLOEXEC)) die("pipe");
    pid_t child = start(command, input[0], output[1]);
    if (child < 0) die("fork");
    close(input[0]);
    close(output[1]);
    setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fcntl(connection, F_SETFL, O_NONBLOCK);
    fcntl(input[1], F_SETFL, O_NONBLOCK);
    fcntl(output[0], F_SETFL, O_NONBLOCK);
    in.from = connection, in.to = input[1];
    out.from = output[0], out.to = connection;
    long deadline_ms = 0;
    int signals[] = {SIGTERM, SIGKILL}, step = -1, has_ended = 0, is_gone = 0;
    for (;;) {
        if (!has_ended && waitpid(child, NULL, WNOHANG) == child) {
            has_ended = 1;
            deadline_ms = now_ms() + DRAIN_MS; /* what it wrote last; somebody else may hold its output open */
        }
        if ((told_to_end || in.from < 0) && step < 0 && !has_ended) { /* the end begins */
            step = 0;
            in.from = -1;
            if (in.start == in.end) shut(&in.to);
            deadline_ms = now_ms() + GRACE_MS;
        }
        if (has_ended && (out.from < 0 || now_ms() >= deadline_ms)) break;
        if (!has_ended && step >= 0 && now_ms() >= deadline_ms) {
            kill(-child, signals[step]);
            step = 1;
            deadline_ms = now_ms() + GRACE_MS;
        }
        int is_full_in = in.start < in.end, is_full_out = out.start < out.end;
        struct pollfd polled[] = {
            {is_full_in && is_gone ? -1 : in.from, is_full_in ? POLLRDHUP : POLLIN, 0},
            {is_full_in ? in.to : -1, POLLOUT, 0},
            {is_full_out ? -1 : out.from, POLLIN, 0},
            {is_full_out ? out.to : -1, POLLOUT, 0},
        };
        if (wait_for(polled, 4, deadline_ms) <= 0) continue;
        if (is_full_in && polled[0].revents) { /* closed, but the server does not take what came before: it has as long as any */
            is_gone = 1;
            polled[0].revents = 0;
            if (step < 0 && !has_ended) step = 0, deadline_ms = now_ms() + GRACE_MS;
        }
        if (polled[0].revents || polled[1].revents) {
            int moved = move(&in, polled[0].revents != 0);
            if (moved == 0) in.from = -1;
            if (moved < 0) in.start = in.end = 0, shut(&in.to); /* it reads no more; it may still write */
            if (in.from < 0 && in.start == in.end) shut(&in.to);
        }
        if (polled[2].revents || polled[3].revents) {
            int moved = move(&out, polled[2].revents != 0);
            if (moved == 0) shut(&out.from);
            if (moved < 0) out.start = out.end = 0, out.to = -1, in.from = -1; /* nobody hears it */
        }
        if (in.to < 0) in.start = in.end = 0;
        if (out.to < 0) shut(&out.from);
    }
    kill(-child, SIGKILL); /* what it started and left behind */
}

static int listen_on(int port) {
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), one = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (listener < 0) die("socket");
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, BACKLOG)) die("listen");
    return listener;
}

static int number_of(const char *text, int low, int high) {
    char *rest;
    long number = strtol(text, &rest, 10);
    if (*text == '\0' || *rest != '\0' || number < low || number > high) {
        dprintf(2, "sidegate-relay: error: %s: expected a number from %d to %d\n", text, low, high);
        exit(2);
    }
    return (int)number;
}

int main(int count, char **arguments) {
    if (count < 4) {
        dprintf(2, "usage: sidegate-relay PORT MAX COMMAND [ARGUMENT...]\n");
        return 2;
    }
    int port = number_of(arguments[1], 1, 65535), most = number_of(arguments[2], 1, MOST), running = 0;
    static pid_t servers[MOST];
    sigset_t held;
    sigprocmask(SIG_SETMASK, NULL, &waiting);
    sigemptyset(&held);
    sigaddset(&held, SIGCHLD), sigaddset(&held, SIGTERM), sigaddset(&held, SIGINT);
    sigprocmask(SIG_BLOCK, &held, NULL);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGCHLD, on_child), signal(SIGTERM, on_end), signal(SIGINT, on_end);
    int listener = listen_on(port), has_told = 0;
    while (!told_to_end || running) {
        for (pid_t ended; (ended = waitpid(-1, NULL, WNOHANG)) > 0;) /* the first process inherits orphans too */
            for (int each = 0; each < running; each++)
                if (servers[each] == ended) servers[each] = servers[--running];
        if (told_to_end && !has_told) {
            has_told = 1;
            shut(&listener);
            for (int each = 0; each < running; each++) kill(servers[each], SIGTERM);
        }
        struct pollfd polled = {listener, POLLIN, 0};
        if ((told_to_end && !running) || wait_for(&polled, 1, 0) <= 0 || told_to_end) continue;
        int connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (connection < 0) continue;
        pid_t server = running < most ? fork() : -1;
        if (server == 0) {
            close(listener);
            prctl(PR_SET_PDEATHSIG, SIGTERM);
            serve(connection, arguments + 3);
            _exit(0);
        }
        if (server > 0) servers[running++] = server;
        else dprintf(2, "sidegate-relay: connection refused: %s\n", running < most ? strerror(errno) : "MAX reached");
        close(connection);
    }
    return 0;
}
