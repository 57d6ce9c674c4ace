# shellcheck shell=bash
# Numbers that people give to the scripts. Sourced, never run by itself.

# whole NAME LEAST: NAME holds a whole number from LEAST up, or the script ends. Before any arithmetic: bash would run what is
# in brackets there, and take 08 for an octal number.
whole() {
    local value=${!1}
    if [[ ! $value =~ ^[0-9]{1,9}$ ]] || ((10#$value < $2)); then
        echo "$1='$value': expected a whole number from $2 up" >&2
        exit 1
    fi
    printf -v "$1" %d "$((10#$value))"
}
